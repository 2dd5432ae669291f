"""Fixed points of a recurrence: solved position after position, each given the states of those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .config import SolverConfig
from .loop import Loop
from .preconditioner import Preconditioner
from .result import FixedPoint, Status


@runtime_checkable
class Recurrent(Protocol):
    """A map over (B, T, C) whose positions can be settled one after another."""

    @property
    def own(self) -> int:
        """Leading channels of a position through which it depends on itself."""

    @property
    def order(self) -> Sequence[int]:
        """The positions, each after all the others that it depends on."""

    def start(self, z: Tensor, t: int) -> Tensor:
        """Where to start at position t, (B, own), with those before it in `order` held at z."""

    def column(self, z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        """f at position t of every sample, with those before it in `order` held at z: (B, own) -> (B, C).

        A row must depend on no other row. A layer whose backward pass is to be solved likewise has an
        `adjoint` that is a `Recurrent` too.
        """


@torch.no_grad()
def solve_recurrence(
    f: Recurrent, z0: Tensor, config: SolverConfig, preconditioner: Preconditioner | None = None
) -> FixedPoint:
    """Find z_t = f_t(z_t; z_before), one small solve of independent lanes per position.

    The unknowns are the `own` channels of a position; its other channels follow from them. The residual of a
    lane is that of its own channels, since large other channels would hide it. A position is solved only when
    the ones before it are finished, so its state depends on nothing but them, converged or not. Each position
    starts at `f.start`, so if there are several equilibria, which one is found does not depend on how a text
    is cut into segments.

    Args:
        f: the recurrence.
        z0: state of the lanes at which f is never finite, (B, T, C).
        config: solver, tolerance, budget of evaluations of one position.
        preconditioner: an approximate inverse for the blocks of positions; None: none.
    Returns:
        the `FixedPoint`; its lanes are positions, and `nfe` is that of the position that took the most.
    """
    states = z0.detach().clone()
    config = replace(config, scope="position", cuda_graph="never")  # a column is solved in few iterations
    own = None if preconditioner is None else preconditioner.leading(f.own)
    solved: list[FixedPoint | None] = [None] * z0.shape[1]
    for t in f.order:
        column = _Column(f.column(states, t), f.own)
        result = Loop(column, f.start(states, t), config, own).run()
        kept = result.status != Status.NON_FINITE
        states[:, t] = torch.where(kept.unsqueeze(1), column.whole(result.state), states[:, t])
        solved[t] = replace(result, total_lane_nfe=column.evaluations * z0.shape[0])
    results = [result for result in solved if result is not None]

    def joined(name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results], 1)

    return FixedPoint(
        state=states,
        residual=joined("residual"),
        lane_nfe=joined("lane_nfe"),
        status=joined("status"),
        nfe=max(result.nfe for result in results),
        total_lane_nfe=sum(result.total_lane_nfe for result in results),
    )


class _Column:
    """f at one position as a map of its own channels, (B, own) -> (B, own)."""

    def __init__(self, f: Callable[[Tensor], Tensor], own: int) -> None:
        self.f, self.own, self.evaluations = f, own, 0
        self.last: tuple[Tensor, Tensor] | None = None  # a state, and all channels of f there

    def __call__(self, x: Tensor) -> Tensor:
        fz = self.f(x)
        self.evaluations += 1
        self.last = (x, fz)
        return fz[:, : self.own]

    def whole(self, x: Tensor) -> Tensor:
        """`x` (B, own) and the channels that follow from it, (B, C)."""
        if self.last is None or not torch.equal(self.last[0], x):
            self(x)
        assert self.last is not None
        return torch.cat([x, self.last[1][:, self.own :]], 1)
