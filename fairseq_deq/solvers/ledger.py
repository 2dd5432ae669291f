"""What the loop knows of every lane beside its state, and how a lane's solve is judged in the end."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .result import Status

# A lane whose residual exceeds its best by this factor goes back to its best state.
GROWTH_LIMIT = 1e3
# Restarts (each with half the step) before a lane is given up as stalled, diverged or non-finite.
MAX_RESTARTS = 6
# Where the residual of a lane at rest has changed by this share, what the lane depends on has moved.
MOVED = 0.01
# A lane has diverged when its residual grew by this factor over the first one and never fell below that.
DIVERGED = 10


@dataclass
class Ledger:
    """One entry a lane, (n,) each. Distances are |f(z) - z|, inf: not measured, or not finite.

    Attributes:
        best_distance, best_size: at the best state, the latter |f(z)|.
        first_distance, last_distance, peak_distance: at the first and the last evaluation, and the largest.
        since_best: evaluations since the best state.
        restarts: how often the lane went back to its best state.
        tau: step length.
        evaluations: evaluations of f during which the lane was moving.
        moving: not frozen.
        given_up: frozen without having converged.
        fresh: starts again with its next step, without a history.
    """

    best_distance: Tensor
    best_size: Tensor
    first_distance: Tensor
    last_distance: Tensor
    peak_distance: Tensor
    since_best: Tensor
    restarts: Tensor
    tau: Tensor
    evaluations: Tensor
    moving: Tensor
    given_up: Tensor
    fresh: Tensor

    @classmethod
    def start(cls, lanes: int, tau: float, like: Tensor) -> Ledger:
        """The entries of `lanes` lanes that have not been evaluated yet."""

        def column(value: float, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.full((lanes,), value, dtype=dtype, device=like.device)

        inf = float("inf")
        return cls(
            best_distance=column(inf),
            best_size=column(1.0),
            first_distance=column(inf),
            last_distance=column(inf),
            peak_distance=column(0.0),
            since_best=column(0, torch.int32),
            restarts=column(0, torch.int32),
            tau=column(tau),
            evaluations=column(0, torch.int32),
            moving=column(True, torch.bool),
            given_up=column(False, torch.bool),
            fresh=column(True, torch.bool),
        )

    def rows(self, index: Tensor) -> Ledger:
        """Copies of the entries `index`."""
        return Ledger(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def put(self, index: Tensor, rows: Ledger) -> None:
        """Overwrite the entries `index`."""
        for f in fields(self):
            getattr(self, f.name).index_copy_(0, index, getattr(rows, f.name))

    def record(self, distance: Tensor, size: Tensor, passed: Tensor, starting: bool = True) -> Tensor:
        """Enter an evaluation, and freeze the lanes that pass.

        Args:
            distance, size: |f(z) - z|, inf where not finite, and |f(z)|, (n,).
            passed: (n,) bool, the former is small enough.
            starting: whether it may be the first evaluation of some lane.
        Returns:
            (n,) bool, the lanes whose state is their best so far.
        """
        moving = self.moving
        better = moving & ((distance < self.best_distance) | passed)
        self.best_distance = torch.where(better, distance, self.best_distance)
        self.best_size = torch.where(better, size, self.best_size)
        if starting:
            first = self.first_distance
            self.first_distance = torch.where(torch.isinf(first), distance, first)
        self.last_distance = distance
        self.peak_distance = torch.maximum(self.peak_distance, distance)
        self.evaluations = self.evaluations + moving
        self.since_best = torch.where(better, 0, self.since_best + moving)
        self.moving = moving & ~passed
        return better

    def lost(self, patience: int) -> Tensor:
        """Moving lanes that are far from their best state, or have found none for `patience` evaluations."""
        far = (self.last_distance > GROWTH_LIMIT * self.best_distance) | torch.isinf(self.last_distance)
        return self.moving & (far | (self.since_best >= patience))

    def restart(self, lost: Tensor) -> Tensor:
        """Lanes `lost` (indices or mask) start again with half the step; tells which of them are given up."""
        self.restarts[lost] += 1
        self.tau[lost] *= 0.5
        self.fresh[lost] = True
        self.since_best[lost] = 0
        hopeless = self.restarts[lost] > MAX_RESTARTS
        self.given_up[lost] = hopeless
        self.moving[lost] = ~hopeless
        return hopeless

    def residual(self) -> Tensor:
        """|f(z) - z| / |f(z)| at the best state of every lane, (n,)."""
        residual = self.best_distance / self.best_size.clamp(min=1e-30)
        return torch.where(torch.isinf(self.best_distance), torch.inf, residual)

    def status(self, patience: int) -> Tensor:
        """The `Status` of every lane, (n,) uint8."""
        status = torch.full_like(self.evaluations, Status.MAX_ITER, dtype=torch.uint8)
        stuck = self.given_up | (self.since_best > patience // 2)
        status[stuck] = Status.STALLED
        # A lane that ends at its best state may have got there by restarts only: see how far it went.
        limit = DIVERGED * self.first_distance
        grown = (self.peak_distance > limit) & (self.best_distance >= self.first_distance)
        status[(stuck & grown) | (self.last_distance > limit)] = Status.DIVERGED
        exploded = stuck & torch.isinf(self.peak_distance)
        status[exploded | torch.isinf(self.last_distance)] = Status.NON_FINITE
        status[~self.moving & ~self.given_up] = Status.CONVERGED
        return status
