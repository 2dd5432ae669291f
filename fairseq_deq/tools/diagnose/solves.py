"""How solves go: residual against work for several solvers, forward and backward; time inside f."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...adjoint import adjoint_map
from ...solvers import FixedPoint, SolverConfig, linear_solver_names, solve
from ..probe import Probe, ProbedMap
from .subject import Layer, Subject

# Budgets that the curves are drawn at; each point is a solve of its own.
_BUDGETS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)


@dataclass(frozen=True)
class Curve:
    """Residuals of one solver against the work that it did.

    Attributes:
        name: what the curve is called.
        work: evaluations computed per position, for each budget.
        residual: mean relative residual over the positions.
        worst: the residual that 1% of the positions exceed.
        converged: share of positions that converged.
    """

    name: str
    work: list[float] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    converged: list[float] = field(default_factory=list)

    def add(self, result: FixedPoint) -> None:
        """Add a point."""
        residual = torch.nan_to_num(result.residual.float().flatten(), nan=1e6, posinf=1e6)
        positions = result.state.shape[:-1].numel()
        self.work.append(result.total_lane_nfe / positions)
        self.residual.append(float(residual.mean()))
        self.worst.append(float(residual.quantile(0.99)))
        self.converged.append(float(result.converged.float().mean()))

    @property
    def cost(self) -> float:
        """Evaluations computed per position with the largest budget."""
        return self.work[-1]


def budgets(most: int) -> list[int]:
    """Budgets from 1 to `most`, about half as much again each."""
    return [b for b in _BUDGETS if b < most] + [most]


def forward_solvers(layer: Layer) -> dict[str, tuple[SolverConfig, bool, bool]]:
    """Solvers to compare by name: options, and whether the learned start and preconditioner are used."""
    own = layer.solver
    found = {f"this model's ({own.solver})": (own, True, True)}
    if layer.preconditioner is not None:
        found["the same without what it learned"] = (own, False, False)
    for name in ("anderson", "broyden", "picard"):
        if name != own.solver:
            found[name] = (replace(own, solver=name, memory=0), True, True)
    if own.solver == "anderson":
        found["anderson, 6 states"] = (replace(own, memory=6), True, True)
    return found


def forward_curves(layer: Layer, most: int) -> list[Curve]:
    """Residual against work in the forward solve.

    Args:
        layer: the layer at a block of text.
        most: the largest budget.
    Returns:
        a curve a solver, the model's own first.
    """
    curves = []
    for name, (config, starts, knows) in forward_solvers(layer).items():
        curve, z0 = Curve(name), layer.z0 if starts else torch.zeros_like(layer.z0)
        for budget in budgets(most):
            known = layer.preconditioner if knows else None
            result = solve(layer.f, z0, replace(config, max_evals=budget, policy="best"), known)
            curve.add(result)
            if bool(result.converged.all()):
                break
        curves.append(curve)
    return curves


def backward_solve(layer: Layer, grad: Tensor, config: SolverConfig) -> FixedPoint:
    """The linear solve of the backward pass at the equilibrium.

    Args:
        layer: the layer at a block of text.
        grad: dL/dz*, (B, T, C).
        config: options of the linear solve.
    """
    with torch.enable_grad():
        leaf = layer.state.detach().requires_grad_()
        fz = layer.f(leaf)
    adjoint = adjoint_map(layer.f, fz, leaf, grad, config)
    start, known = grad, layer.preconditioner
    if config.solver in linear_solver_names():
        start = torch.zeros_like(grad)
        config = replace(config, scope="batch" if config.scope == "batch" else "sample")
    transposed = None if known is None else known.transposed
    return solve(adjoint, start, replace(config, policy="best"), transposed)


def backward_curves(subject: Subject, layer: Layer, grad: Tensor, most: int) -> list[Curve]:
    """Residual against work in the backward solve, the model's own solver first."""
    own = subject.decoder.gradient.solver
    found = {f"this model's ({own.solver})": own}
    for name in ("anderson", "broyden", "picard", "gmres"):
        if name != own.solver:
            memory = 5 if name == "anderson" else 0
            found[name] = replace(own, solver=name, memory=memory)
    curves = []
    for name, config in found.items():
        curve = Curve(name)
        for budget in budgets(most):
            result = backward_solve(layer, grad, replace(config, max_evals=budget))
            curve.add(result)
            if bool(result.converged.all()):
                break
        curves.append(curve)
    return curves


@dataclass(frozen=True)
class TimeInside:
    """Where the time of a forward solve goes.

    Attributes:
        seconds: of the whole solve.
        inside: of those, inside f.
    """

    seconds: float
    inside: float

    @property
    def share(self) -> float:
        """Share inside f."""
        return self.inside / self.seconds if self.seconds else 0.0


def time_inside(layer: Layer) -> TimeInside:
    """Time one forward solve, the second of two."""
    for _ in range(2):
        probe = Probe(layer.state.numel())
        timed: Any = probe.solver(solve, lambda result: result.state)
        timed(ProbedMap(layer.f, probe), layer.z0, layer.solver, layer.preconditioner)
    phase = probe.phases["f"]
    return TimeInside(phase.seconds, phase.inside)


def shares(values: Tensor, edges: Sequence[float]) -> list[float]:
    """Share of `values` (n,) in each bin between neighbouring `edges`; the outer ones take the rest."""
    inner = torch.tensor(list(edges[1:-1]), dtype=torch.float64)
    places = torch.bucketize(values.double(), inner, right=True)
    counts = torch.bincount(places, minlength=len(edges) - 1)
    return (counts / max(len(values), 1)).tolist()
