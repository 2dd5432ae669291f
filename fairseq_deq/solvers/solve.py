"""Fixed points of any map: the entry point, and what to do where a solve fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .config import SolverConfig
from .lanes import LaneShape
from .loop import Loop
from .recurrence import Recurrent, solve_recurrence
from .registry import get_linear_solver
from .result import ConvergenceError, ConvergenceWarning, FixedPoint


@torch.no_grad()
def solve(f: Callable[[Tensor], Tensor] | Recurrent, z0: Tensor, config: SolverConfig) -> FixedPoint:
    """Find z with z = f(z), lane by lane.

    Args:
        f: map of a tensor to one of the same shape; where it has `restrict` (see `Restrictable`), frozen
            lanes are not evaluated. A linear solver (`gmres`) needs it to be affine, scope `recurrence` to be
            a `Recurrent`.
        z0: starting state, (..., C); dimension 0 indexes independent samples.
        config: solver, budget, tolerance, scope, policy.
    Returns:
        the `FixedPoint`; its state is detached and finite wherever z0 is.
    Raises:
        ConvergenceError: policy `raise`, and some lane did not converge.
        ValueError: scope `recurrence`, and f is no `Recurrent`.
    """
    return apply_policy(_solve(f, z0, config), f, config)


def _solve(f: Callable[[Tensor], Tensor] | Recurrent, z0: Tensor, config: SolverConfig) -> FixedPoint:
    linear = get_linear_solver(config.solver)
    if linear is not None:
        return linear(f, z0, config)  # type: ignore[arg-type]
    if config.scope != "recurrence":
        return Loop(f, z0, config).run()  # type: ignore[arg-type]
    if not isinstance(f, Recurrent):
        raise ValueError("scope recurrence needs a map with `own`, `order` and `column`: see Recurrent")
    return solve_recurrence(f, z0, config)


@torch.no_grad()
def solve_keeping_inverse(
    f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig
) -> tuple[FixedPoint, Callable[[Tensor], Tensor]]:
    """The same, and the solver's estimate of v -> (I - J)^{-T} v at its end, for v shaped as z0.

    Args:
        f, z0, config: as for `solve`; a linear solver has no estimate to give.
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
    loop = Loop(f, z0, config, keep_inverse=True)
    return apply_policy(loop.run(), f, config), torch.no_grad()(loop.inverse_transpose)


def apply_policy(
    result: FixedPoint, f: Callable[[Tensor], Tensor] | Recurrent, config: SolverConfig
) -> FixedPoint:
    """`result`, or what the policy makes of it where a lane did not converge."""
    if config.policy == "best" or bool(result.converged.all()):
        return result
    if config.policy == "raise":
        raise ConvergenceError(result.explain())
    return _fall_back(f, result, config)


def _fall_back(
    f: Callable[[Tensor], Tensor] | Recurrent, first: FixedPoint, config: SolverConfig
) -> FixedPoint:
    """Damped Picard from the best state, on the lanes of the samples that failed; keeps what is better."""
    warnings.warn(
        f"{config.solver} did not converge, trying damped picard. {first.explain()}",
        ConvergenceWarning,
        stacklevel=4,
    )
    damped = replace(config, solver="picard", memory=0, damping=min(config.damping, 0.5), policy="best")
    second = _solve(f, first.state, damped)
    better = second.residual < first.residual
    lanes = LaneShape.of(first.state, config.scope)
    rows = torch.where(better.view(-1, 1), lanes.flatten(second.state), lanes.flatten(first.state))
    return FixedPoint(
        state=lanes.unflatten(rows),
        residual=torch.where(better, second.residual, first.residual),
        evaluations=first.evaluations + second.evaluations,
        status=torch.where(better, second.status, first.status),
        iterations=first.iterations + second.iterations,
        lane_evaluations=first.lane_evaluations + second.lane_evaluations,
    )
