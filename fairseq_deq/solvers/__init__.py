"""Fixed points of any map over a tensor (..., C), lane by lane. Knows only torch."""

from . import anderson, broyden, gmres, picard  # noqa: F401  (each registers its solver)
from .config import SolverConfig
from .lanes import Restrictable
from .recurrence import Recurrent
from .registry import Stepper, linear_solver_names, register_linear_solver, register_solver, solver_names
from .result import ConvergenceError, ConvergenceWarning, FixedPoint, Status, worst_residual
from .solve import solve, solve_keeping_inverse

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPoint",
    "Recurrent",
    "Restrictable",
    "SolverConfig",
    "Status",
    "Stepper",
    "linear_solver_names",
    "register_linear_solver",
    "register_solver",
    "solve",
    "solve_keeping_inverse",
    "solver_names",
    "worst_residual",
]
