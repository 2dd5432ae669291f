"""The fixed point z* = f(z*) of a layer, and several ways to differentiate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adjoint import adjoint_map
from .equilibrium import Equilibrium, SolveStats
from .solvers import (
    Preconditioner,
    SolverConfig,
    Trace,
    check_state,
    linear_solver_names,
    solve,
    solve_keeping_inverse,
)

GRADIENTS = ("ift", "shine", "phantom", "jfb", "unroll")
# Where the estimate of `shine` is longer than this times dL/dz*, the latter takes its place: a history of few
# states can be far off in directions that it has hardly seen.
_SHINE_LIMIT = 3.0
# Evaluations of the linear solve at least, where it follows the forward one.
_LEAST_BACKWARD = 40


@dataclass(frozen=True)
class GradientConfig:
    """How to differentiate a fixed point.

    Attributes:
        mode: `ift`, exact through the implicit function theorem; `shine`, the forward solver's estimate of
            the inverse Jacobian, refined by `refine` evaluations of the linear solve; `phantom`, `steps`
            damped steps at the fixed point; `jfb`, one undamped step; `unroll`, ordinary autograd through
            every evaluation.
        solver: options of the linear solve in `ift` and `shine`; None: those of the forward solve, with its
            relative tolerance (1e-3 if that is absolute) and a budget of at least 40 evaluations.
        steps, damping: number of steps k and step length tau of `phantom`.
        refine: evaluations of the linear solve in `shine`; 0 uses the estimate unchanged.
    """

    mode: str = "ift"
    solver: SolverConfig | None = None
    steps: int = 5
    damping: float = 1.0
    refine: int = 5

    def __post_init__(self) -> None:
        if self.mode not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}; got {self.mode!r}")
        if self.steps < 1:
            raise ValueError(f"phantom needs at least 1 step, got {self.steps}")
        if self.refine < 0:
            raise ValueError(f"shine refine must be at least 0, got {self.refine}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"phantom damping must lie in (0, 1], got {self.damping!r}")
        if self.solver is not None and not isinstance(self.solver, SolverConfig):
            raise ValueError(f"solver must be a SolverConfig, or None, got {self.solver!r}")

    def following(self, forward: SolverConfig) -> GradientConfig:
        """The same, with options of the linear solve derived from the forward solve if it has none."""
        if self.solver is not None:
            return self
        evaluations = max(forward.max_evals, _LEAST_BACKWARD)
        return replace(
            self, solver=replace(forward, max_evals=evaluations, rtol=forward.rtol or 1e-3, atol=0.0)
        )


def fixed_point(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    solver: SolverConfig | None = None,
    gradient: GradientConfig | None = None,
    forward: SolveStats | None = None,
    backward: SolveStats | None = None,
    preconditioner: Preconditioner | None = None,
    trace: Trace | None = None,
) -> Equilibrium:
    """Solve z* = f(z*) and attach a gradient to it.

    With J = df/dz at z*, dL/dtheta = (df/dtheta)^T lambda, where lambda = J^T lambda + dL/dz*. Tensors that f
    closes over get their gradients as in ordinary autograd. Tracking follows `torch.is_grad_enabled()`.

    Args:
        f: map of a tensor to a tensor of the same shape.
        z0: starting state, (..., C); gets no gradient except through `unroll`.
        solver: options of the forward solve, None: the defaults; `unroll` takes
            `max_evals` steps of length `damping`.
        gradient: how to differentiate; None: `ift`.
        forward, backward: statistics to add the two solves to; new ones where None.
        preconditioner: an approximate inverse known before, used by both solves; None: none.
        trace: called with each state of the forward solve, as in `solve`; not with `unroll` and `shine`.
    Returns:
        the `Equilibrium`.
    Raises:
        ValueError: z0 cannot be a state, or the options contradict each other.
    Source: Bai, Kolter, Koltun (2019, arXiv 1909.01377); phantom: Geng et al. (2021, arXiv 2111.05177);
        jfb: Fung et al. (2021, arXiv 2103.12803); shine: Ramzi et al. (2022, arXiv 2106.00553).
    """
    check_state(z0)
    solver = solver or SolverConfig()
    gradient = (gradient or GradientConfig()).following(solver)
    forward = forward or SolveStats.empty(z0.device)
    backward = backward or SolveStats.empty(z0.device)
    if trace is not None and gradient.mode in ("unroll", "shine"):
        raise ValueError(f"trace cannot follow gradient {gradient.mode}; use ift, phantom or jfb, or `solve`")
    if gradient.mode == "unroll":
        return Equilibrium(unroll(f, z0, solver.max_evals, solver.damping), None, forward, backward)
    inverse: Callable[[Tensor], Tensor] | None = None
    if gradient.mode == "shine" and torch.is_grad_enabled():
        result, inverse = solve_keeping_inverse(f, z0, solver, preconditioner)
    else:
        result = solve(f, z0, solver, preconditioner, trace)
    forward.record(result)
    if not torch.is_grad_enabled():
        return Equilibrium(result.state, result, forward, backward)
    leaf = result.state.detach().requires_grad_()
    fz = f(leaf)
    if gradient.mode in ("ift", "shine"):
        state = _ImplicitGradient.apply(fz, leaf, f, gradient, inverse, backward, preconditioner)
        return Equilibrium(state, result, forward, backward, taped=(fz, leaf))
    steps, damping = (1, 1.0) if gradient.mode == "jfb" else (gradient.steps, gradient.damping)
    state = unroll(f, _stepped(result.state, fz, damping), steps - 1, damping)
    return Equilibrium(state, result, forward, backward, taped=(fz, leaf))


def unroll(f: Callable[[Tensor], Tensor], z: Tensor, steps: int, damping: float = 1.0) -> Tensor:
    """`steps` times z <- z + damping*(f(z) - z), through ordinary autograd.

    Args:
        f: map of a tensor to one of the same shape.
        z: starting state.
        steps: number of steps.
        damping: step length in (0, 1].
    Returns:
        the last state.
    """
    for _ in range(steps):
        z = _stepped(z, f(z), damping)
    return z


def _stepped(z: Tensor, fz: Tensor, damping: float) -> Tensor:
    return fz if damping == 1.0 else z + damping * (fz - z)


class _ImplicitGradient(torch.autograd.Function):
    """Passes z* on; turns its gradient g into the lambda of lambda = J^T lambda + g."""

    @staticmethod
    def forward(
        ctx: Any,
        fz: Tensor,
        leaf: Tensor,
        f: Callable[[Tensor], Tensor],
        gradient: GradientConfig,
        inverse: Callable[[Tensor], Tensor] | None,
        stats: SolveStats,
        preconditioner: Preconditioner | None,
    ) -> Tensor:
        ctx.save_for_backward(fz, leaf)
        ctx.f, ctx.gradient, ctx.inverse, ctx.stats = f, gradient, inverse, stats
        ctx.preconditioner = None if preconditioner is None else preconditioner.transposed
        # J is that of f as it was evaluated, also where autocast lowered its precision.
        kind = leaf.device.type
        ctx.precision = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return leaf.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the implicit gradient cannot be differentiated again (create_graph=True); "
                "use gradient mode unroll"
            )
        fz, leaf = ctx.saved_tensors
        dtype = fz.dtype
        grad = grad.to(leaf.dtype)
        solver, start = ctx.gradient.solver, grad
        if ctx.inverse is not None:
            start = ctx.inverse(grad)
            longest = _SHINE_LIMIT * torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
            sound = torch.linalg.vector_norm(start, dim=-1, keepdim=True) <= longest
            start = torch.where(sound, start, grad)
            if ctx.gradient.refine == 0:
                return start.to(dtype), *[None] * 6
            solver = replace(solver, max_evals=ctx.gradient.refine, policy="best")
        kind, precision, enabled = ctx.precision
        with torch.autocast(kind, dtype=precision, enabled=enabled):
            adjoint = adjoint_map(ctx.f, fz, leaf, grad, solver)
            if solver.solver in linear_solver_names():
                # From zero its first evaluation gives the constant of the map; one Krylov space per sample.
                start = torch.zeros_like(grad)
                solver = replace(solver, scope="batch" if solver.scope == "batch" else "sample")
            result = solve(adjoint, start, solver, ctx.preconditioner)
        ctx.stats.record(result)
        return result.state.to(dtype), *[None] * 6
