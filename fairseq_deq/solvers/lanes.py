"""How a state of shape (..., C) divides into lanes, the independent unknowns of a solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Restrictable(Protocol):
    """A map that can be evaluated at some positions only."""

    def __call__(self, z: Tensor) -> Tensor:
        """f(z) for z of shape (..., C)."""

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f at the flat `positions` (n,), sorted, with all other positions held at z: (n, C) -> (n, C).

        `value` is f(z) at the positions, (n, C), where that is known: an affine f can make use of it.
        """


def direction_of(f: Any) -> int:
    """Which positions of a sample a position depends on: 1, itself and those before it; -1, itself and those
    after it; 0, any. It is the attribute `direction` of f, 0 where f has none."""
    return getattr(f, "direction", 0)


@dataclass(frozen=True)
class LaneLayout:
    """The lanes of one state: rows of a matrix (N, D).

    Attributes:
        full: shape of the state, (..., C).
        shape: shape of the lanes: (...) in position scope and of a recurrence, (B,) in sample scope, (1,) in
            batch scope.
        samples: number of independent samples, B (1 in batch scope).
    """

    full: torch.Size
    shape: torch.Size
    samples: int

    @classmethod
    def of(cls, z: Tensor, scope: str) -> LaneLayout:
        """The lanes of `z` in `scope`.

        Raises:
            ValueError: z has fewer than two dimensions.
        """
        if z.dim() < 2:
            raise ValueError(f"a state needs shape (samples, ..., C), got {tuple(z.shape)}")
        shapes = {
            "position": z.shape[:-1],
            "recurrence": z.shape[:-1],
            "sample": z.shape[:1],
            "batch": torch.Size([1]),
        }
        return cls(z.shape, shapes[scope], 1 if scope == "batch" else z.shape[0])

    @cached_property
    def count(self) -> int:
        """Number of lanes, N."""
        return self.shape.numel()

    @cached_property
    def width(self) -> int:
        """Channels of the state, C."""
        return self.full[-1]

    @cached_property
    def coupled(self) -> bool:
        """Whether lanes of one sample may depend on each other, so that a frozen one must be rechecked."""
        return self.count > self.samples

    def flatten(self, z: Tensor) -> Tensor:
        """(..., C) -> (N, D)."""
        return z.reshape(self.count, self.full.numel() // max(self.count, 1))

    def unflatten(self, rows: Tensor) -> Tensor:
        """(N, D) -> (..., C)."""
        return rows.reshape(self.full)

    def positions(self, lanes: Tensor) -> Tensor:
        """Flat positions (indices into the state as (-1, C)) that the flat lanes cover."""
        per_lane = self.full[:-1].numel() // self.count
        if per_lane == 1:
            return lanes
        return (lanes.unsqueeze(1) * per_lane + torch.arange(per_lane, device=lanes.device)).reshape(-1)
