"""Fixed points of any map: the entry point, and what happens when a solve fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .captured import CapturedLoop, can_capture
from .config import SolverConfig
from .early_precision import EARLY_SHARE, EARLY_TOLERANCES, lowered
from .inverse import inverse_transpose
from .lanes import LaneLayout
from .loop import Loop, Trace
from .preconditioner import Preconditioner
from .recurrence import Recurrent, solve_recurrence
from .registry import get_linear_solver, solver_names
from .result import ConvergenceError, ConvergenceWarning, FixedPoint, Status

Map = Callable[[Tensor], Tensor]


@torch.no_grad()
def solve(
    f: Map | Recurrent,
    z0: Tensor,
    config: SolverConfig | None = None,
    preconditioner: Preconditioner | None = None,
    trace: Trace | None = None,
) -> FixedPoint:
    """Find z with z = f(z), lane by lane.

    Args:
        f: map of a tensor to one of the same shape; where it has `restrict` (see `Restrictable`), frozen
            lanes are not evaluated. A linear solver (`gmres`) needs it to be affine, scope `recurrence` to be
            a `Recurrent`.
        z0: starting state, (..., C); dimension 0 indexes independent samples.
        config: solver, budget, tolerance, scope, policy; None: the defaults.
        preconditioner: an approximate inverse known before the solve; None: none. Linear solvers ignore it.
        trace: called before each evaluation of f with the number of evaluations so far and the state,
            (..., C); a lane that is not evaluated keeps its last value there. None: not called.
    Returns:
        the `FixedPoint`; its state is detached and finite wherever z0 is.
    Raises:
        ConvergenceError: policy `raise`, and some lane did not converge.
        ValueError: z0 cannot be a state, f changes the shape of a state, scope is `recurrence` and f no
            `Recurrent`, or `trace` is given with a linear solver or scope `recurrence`.
    """
    config = config or SolverConfig()
    check_state(z0)
    if config.scope == "position" and z0.dim() > 3:
        warnings.warn(
            f"a state of shape {tuple(z0.shape)} is read with channels last, and every index of the other "
            "axes is solved as one unknown; if channels are not last, as in images, use scope sample",
            stacklevel=2,
        )
    if z0.numel() == 0:
        return _nothing(z0, config)
    return _apply_policy(_solve(f, z0, config, preconditioner, trace), f, config, preconditioner)


def check_state(z0: Tensor) -> None:
    """Raise ValueError unless `z0` can be the start of a solve: a floating-point tensor (samples, ..., C)."""
    if not isinstance(z0, Tensor):
        several = (
            "; join several tensors into one state with StatePacking" if isinstance(z0, (tuple, list)) else ""
        )
        raise ValueError(f"z0 must be a tensor (samples, ..., C), got {type(z0).__name__}{several}")
    if not z0.is_floating_point():
        raise ValueError(f"z0 must be of a floating-point type, got {z0.dtype}")
    if z0.dim() < 2:
        raise ValueError(f"z0 needs shape (samples, ..., C), got {tuple(z0.shape)}")


def _nothing(z0: Tensor, config: SolverConfig) -> FixedPoint:
    """The outcome for a state without any number."""
    lanes = torch.zeros(LaneLayout.of(z0, config.scope).shape, device=z0.device)
    converged = torch.full_like(lanes, Status.CONVERGED, dtype=torch.uint8)
    return FixedPoint(z0.detach().clone(), lanes, lanes.int(), converged, 0, 0)


def _solve(
    f: Map | Recurrent,
    z0: Tensor,
    config: SolverConfig,
    preconditioner: Preconditioner | None,
    trace: Trace | None = None,
) -> FixedPoint:
    linear = get_linear_solver(config.solver)
    if trace is not None and (linear is not None or config.scope == "recurrence"):
        raise ValueError(
            f"trace cannot follow solver {config.solver} in scope {config.scope}; use "
            f"{', '.join(solver_names())} in scope position, sample or batch"
        )
    if linear is not None:
        return linear(f, z0, config)  # type: ignore[arg-type]
    if config.scope != "recurrence":
        return _solve_lanes(f, z0, config, preconditioner, trace)  # type: ignore[arg-type]
    if not isinstance(f, Recurrent):
        raise ValueError("scope recurrence needs a map with `own`, `order` and `column`: see Recurrent")
    return solve_recurrence(f, z0, config, preconditioner)


def _solve_lanes(
    f: Map, z0: Tensor, config: SolverConfig, preconditioner: Preconditioner | None, trace: Trace | None
) -> FixedPoint:
    """One loop, or two: the first in a lower precision, if that is asked for and can help."""
    early = EARLY_TOLERANCES.get(config.early_precision, 0.0)
    budget = int(EARLY_SHARE * config.max_evals)
    loop = CapturedLoop if can_capture(config, z0.device) else Loop
    if early <= (config.rtol or config.atol) or budget < 1 or z0.dtype != torch.float32:
        return loop(f, z0, config, preconditioner).run(trace)
    loose = replace(config, rtol=early, atol=0.0, max_evals=budget)
    with lowered(config.early_precision, z0.device):
        first = loop(f, z0, loose, preconditioner).run(trace)
    rest = replace(config, max_evals=config.max_evals - first.nfe)
    later = None if trace is None else lambda done, state: trace(first.nfe + done, state)
    return first.followed_by(loop(f, first.state, rest, preconditioner).run(later))


@torch.no_grad()
def solve_keeping_inverse(
    f: Map, z0: Tensor, config: SolverConfig, preconditioner: Preconditioner | None = None
) -> tuple[FixedPoint, Map]:
    """As `solve`, but also return the solver's final estimate of v -> (I - J)^{-T} v, for v shaped as z0.

    Args:
        f, z0, config, preconditioner: as for `solve`; a linear solver has no such estimate.
    Returns:
        the `FixedPoint`, and the estimate, which holds the solver's history.
    Raises:
        ValueError: the solver is a linear one, or the scope is `recurrence`.
        ConvergenceError: as in `solve`.
    Source: Ramzi et al. (2022, arXiv 2106.00553), who reuse the inverse of a quasi-Newton solver.
    """
    if get_linear_solver(config.solver) is not None:
        raise ValueError(
            f"solver {config.solver} keeps no estimate of the inverse Jacobian; use anderson or broyden"
        )
    if config.scope == "recurrence":
        raise ValueError(
            "scope recurrence keeps no estimate of the inverse Jacobian; use position, sample or batch"
        )
    check_state(z0)
    loop = Loop(f, z0, replace(config, cuda_graph="never"), preconditioner, keep_inverse=True)
    result = _apply_policy(loop.run(), f, config, preconditioner)
    return result, torch.no_grad()(partial(inverse_transpose, loop))


def _apply_policy(
    result: FixedPoint, f: Map | Recurrent, config: SolverConfig, preconditioner: Preconditioner | None
) -> FixedPoint:
    """`result`, or what the policy asks for if a lane did not converge."""
    if config.policy == "best" or bool(result.converged.all()):
        return result
    if config.policy == "raise":
        raise ConvergenceError(result.explain())
    return _fall_back(f, result, config, preconditioner)


def _fall_back(
    f: Map | Recurrent, first: FixedPoint, config: SolverConfig, preconditioner: Preconditioner | None
) -> FixedPoint:
    """Damped Picard from the best state, on the lanes of the samples that failed; keeps what is better."""
    warnings.warn(
        f"{config.solver} did not converge, trying damped picard. {first.explain()}",
        ConvergenceWarning,
        stacklevel=4,
    )
    damped = replace(config, solver="picard", memory=0, damping=min(config.damping, 0.5), policy="best")
    second = _solve(f, first.state, damped, preconditioner)
    better = second.residual < first.residual
    lanes = LaneLayout.of(first.state, config.scope)
    rows = torch.where(better.view(-1, 1), lanes.flatten(second.state), lanes.flatten(first.state))
    return FixedPoint(
        state=lanes.unflatten(rows),
        residual=torch.where(better, second.residual, first.residual),
        lane_nfe=first.lane_nfe + second.lane_nfe,
        status=torch.where(better, second.status, first.status),
        nfe=first.nfe + second.nfe,
        total_lane_nfe=first.total_lane_nfe + second.total_lane_nfe,
    )
