"""Fixed points of any map over a tensor (..., C), lane by lane. Knows only torch."""

from . import anderson, broyden, picard  # noqa: F401  (each registers its solver)
from .config import SolverConfig
from .registry import Stepper, register_solver, solver_names
from .result import ConvergenceError, ConvergenceWarning, FixedPoint, Status, worst_residual
from .solve import Restrictable, solve

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPoint",
    "Restrictable",
    "SolverConfig",
    "Status",
    "Stepper",
    "register_solver",
    "solve",
    "solver_names",
    "worst_residual",
]
