"""The linear map of the backward solve, lambda -> J^T lambda + g, at all positions or at some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .solvers import Restrictable, SolverConfig, direction_of


@runtime_checkable
class HasAdjoint(Protocol):
    """A map that knows its transposed Jacobian."""

    def __call__(self, z: Tensor) -> Tensor:
        """f(z)."""

    def adjoint(self, z: Tensor, grad: Tensor) -> Callable[[Tensor], Tensor]:
        """lambda -> J^T lambda + grad, with J = df/dz at z; best as a `Restrictable`, or a `Recurrent`."""


class _AdjointMap:
    """lambda -> J^T lambda + grad, with J taken from one taped evaluation of f."""

    # Autograd runs on the stream of that evaluation, so that no other stream can record it as a CUDA graph.
    is_taped = True

    def __init__(self, fz: Tensor, leaf: Tensor, grad: Tensor, direction: int = 0) -> None:
        self.fz, self.leaf, self.grad, self.direction = fz, leaf, grad, direction

    def __call__(self, adjoint: Tensor) -> Tensor:
        return _vjp(self.fz, self.leaf, adjoint) + self.grad


class _RestrictableAdjointMap(_AdjointMap):
    """The same where f can be evaluated, and so taped again, at some positions only."""

    def __init__(self, f: Restrictable, fz: Tensor, leaf: Tensor, grad: Tensor) -> None:
        super().__init__(fz, leaf, grad, -direction_of(f))
        self.f = f

    def restrict(
        self, adjoint: Tensor, positions: Tensor, value: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """The map at `positions`: the share of the other positions is computed once, from `adjoint`."""
        width, state = self.leaf.shape[-1], self.leaf.detach()
        own = adjoint.reshape(-1, width).index_select(0, positions)
        with torch.enable_grad():
            leaf = state.reshape(-1, width).index_select(0, positions).requires_grad_()
            fz = self.f.restrict(state, positions, None)(leaf)
        if value is None:
            value = self(adjoint).reshape(-1, width).index_select(0, positions)
        return _AdjointMap(fz, leaf, value - _vjp(fz, leaf, own))


def adjoint_map(
    f: Callable[[Tensor], Tensor], fz: Tensor, leaf: Tensor, grad: Tensor, solver: SolverConfig
) -> Callable[[Tensor], Tensor]:
    """lambda -> J^T lambda + grad, with J = df/dz at `leaf`: f's own, or from the graph of fz.

    Args:
        f: the map.
        fz, leaf: f(z), with its graph, and the leaf z that it was evaluated at, (..., C).
        grad: (..., C).
        solver: options of the solve that the map is for.
    """
    if isinstance(f, HasAdjoint):
        return f.adjoint(leaf.detach(), grad)
    if fz.grad_fn is None:  # activation checkpointing hands back values without their graph
        with torch.enable_grad():
            leaf = leaf.detach().requires_grad_()
            fz = f(leaf)
    if solver.active_set != "never" and isinstance(f, Restrictable):
        return _RestrictableAdjointMap(f, fz, leaf, grad)
    return _AdjointMap(fz, leaf, grad, -direction_of(f))


def _vjp(out: Tensor, leaf: Tensor, vector: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(out, leaf, vector.to(out.dtype), retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if product is None else product
