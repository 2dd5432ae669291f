"""Fixed points of any map over a tensor (..., C), lane by lane. Knows only torch."""

from . import anderson, broyden, gmres, picard  # noqa: F401  (each registers its solver)
from .config import SolverConfig
from .few_lanes import solve_few
from .lanes import Restrictable, direction_of
from .loop import Trace
from .packing import StatePacking
from .preconditioner import Preconditioner
from .recordings import release_recordings
from .recurrence import Recurrent
from .registry import Method, linear_solver_names, register_linear_solver, register_solver, solver_names
from .result import ConvergenceError, ConvergenceWarning, FixedPoint, Status, worst_residual
from .solve import check_state, solve, solve_keeping_inverse

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPoint",
    "Method",
    "Preconditioner",
    "Recurrent",
    "Restrictable",
    "SolverConfig",
    "StatePacking",
    "Status",
    "Trace",
    "check_state",
    "direction_of",
    "linear_solver_names",
    "register_linear_solver",
    "register_solver",
    "release_recordings",
    "solve",
    "solve_few",
    "solve_keeping_inverse",
    "solver_names",
    "worst_residual",
]
