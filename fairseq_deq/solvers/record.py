"""The record of every lane of a solve, beside its state, and the rules that judge a lane.

The arrays of the record, with one entry per lane, are called its *books*.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fused import fused
from .result import Status

# Entries are arrays of NumPy (solves on the CPU) or tensors on the device of the solve (elsewhere, so that no
# iteration waits for the host). The rules below use what both have in common.
Array = Any

# A lane whose residual exceeds its best by this factor goes back to its best state.
GROWTH_LIMIT = 1e3
# Restarts before a lane is abandoned as stalled, diverged or non-finite.
MAX_RESTARTS = 6
# Where the residual of a lane at rest has changed by this share, what the lane depends on has moved.
MOVED = 0.01
inf = float("inf")
# A lane has diverged when its residual grew by this factor over the first one and never fell below that.
DIVERGED = 10


def namespace(array: Array) -> Any:
    """The module, numpy or torch, whose functions work on `array`."""
    return torch if isinstance(array, Tensor) else np


def books_on_host(device: torch.device) -> bool:
    """Whether the books of a solve on `device` are arrays of NumPy."""
    return device.type == "cpu"


@dataclass(frozen=True)
class RestartManner:
    """How a lane goes on after so many restarts, which is the index.

    The first restart halves the step, since many a lane overshoots. The second takes full steps without
    the preconditioner, and goes on without a history: near a kink of f the history misleads, where plain
    iteration goes straight through. From then on both take turns, with ever smaller steps.

    Attributes:
        tau: step length.
        alone: whether it goes on without a history.
    """

    tau: Array
    alone: Array

    @classmethod
    def starting_with(cls, tau: float, device: torch.device) -> RestartManner:
        """From the step length at the start of the solve."""
        number = np.arange(MAX_RESTARTS + 2)
        even = number % 2 == 0
        lengths, alone = tau * 0.5 ** ((number + 1) // 2 - even), even & (number > 0)
        lengths[0] = tau
        if books_on_host(device):
            return cls(lengths, alone)
        return cls(torch.from_numpy(lengths).to(device), torch.from_numpy(alone).to(device))


@dataclass
class LaneRecord:
    """One entry per lane, (n,) each. Distances are |f(z) - z|, inf: not measured, or not finite.

    Attributes:
        best_distance, best_size: at the best state, the latter |f(z)|.
        first_distance, last_distance, peak_distance: at the first and the last evaluation, and the largest.
        since_best: evaluations since the best state.
        restarts: how often the lane went back to its best state.
        tau: step length.
        evaluations: evaluations of f during which the lane was moving.
        moving: not frozen.
        abandoned: frozen without having converged.
        restarted: its next step starts without a history.
        plain: it goes on without the preconditioner.
        alone: it goes on without a history, by damped fixed-point iteration.
    """

    best_distance: Array
    best_size: Array
    first_distance: Array
    last_distance: Array
    peak_distance: Array
    since_best: Array
    restarts: Array
    tau: Array
    evaluations: Array
    moving: Array
    abandoned: Array
    restarted: Array
    plain: Array
    alone: Array

    @classmethod
    def start(cls, lanes: int, tau: float, device: torch.device) -> LaneRecord:
        """The entries of `lanes` lanes that have not been evaluated yet."""
        xp = np if books_on_host(device) else torch
        where = {} if xp is np else {"device": device}

        def column(value: float, dtype: Any = xp.float64) -> Array:
            return xp.full((lanes,), value, dtype=dtype, **where)

        return cls(
            best_distance=column(inf),
            best_size=column(1.0),
            first_distance=column(inf),
            last_distance=column(inf),
            peak_distance=column(0.0),
            since_best=column(0, xp.int32),
            restarts=column(0, xp.int32),
            tau=column(tau),
            evaluations=column(0, xp.int32),
            moving=column(True, xp.bool),
            abandoned=column(False, xp.bool),
            restarted=column(False, xp.bool),  # at the start there is no history to be forgotten
            plain=column(False, xp.bool),
            alone=column(False, xp.bool),
        )

    def rows(self, index: Array) -> LaneRecord:
        """Copies of the entries `index`."""
        return LaneRecord(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Array, rows: LaneRecord) -> None:
        """Overwrite the entries `index`."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(rows, f.name)

    def judge(self, distance: Array, size: Array, passed: Array) -> Array:
        """Enter an evaluation, and freeze the lanes that pass.

        Args:
            distance, size: |f(z) - z|, inf where not finite, and |f(z)|, (n,).
            passed: (n,) bool, the former is small enough.
        Returns:
            (n,) bool, the lanes whose state is their best so far.
        """
        if isinstance(distance, Tensor):
            return self._enter(distance, size, passed)
        closer = (distance < self.best_distance) | passed
        if np.count_nonzero(closer & self.moving) < len(closer):
            return self._enter(distance, size, passed)
        # Most iterations are like this one: every lane moves and comes closer. The outcome is the same.
        self.first_distance = np.where(np.isinf(self.first_distance), distance, self.first_distance)
        self.best_distance, self.last_distance = distance, distance.copy()  # `put` writes to each by itself
        self.best_size = size
        self.peak_distance = np.maximum(self.peak_distance, distance)
        self.evaluations = self.evaluations + 1
        self.since_best = np.zeros_like(self.since_best)
        self.moving = ~passed
        return closer

    @fused
    def _enter(self, distance: Array, size: Array, passed: Array) -> Array:
        """`judge` for lanes of all kinds."""
        xp, moving = namespace(distance), self.moving
        better = moving & ((distance < self.best_distance) | passed)
        self.best_distance = xp.where(better, distance, self.best_distance)
        self.best_size = xp.where(better, size, self.best_size)
        first = self.first_distance
        self.first_distance = xp.where(first == inf, distance, first)
        # Of a frozen lane nothing is entered: whether it was evaluated at all depends on other samples.
        self.last_distance = xp.where(moving, distance, self.last_distance)
        self.peak_distance = xp.maximum(self.peak_distance, self.last_distance)
        self.evaluations = self.evaluations + moving
        self.since_best = (self.since_best + moving) * ~better
        self.moving = moving > passed  # and not passed
        return better

    def must_restart(self, patience: int) -> tuple[Array, Array]:
        """Moving lanes that are far from their best state, or have found none for `patience` evaluations; and
        all lanes that are far from it."""
        last = self.last_distance
        far = (last > GROWTH_LIMIT * self.best_distance) | (last == inf)
        return self.moving & (far | (self.since_best >= patience)), far

    def restart(self, lanes: Array, far: Array, manner: RestartManner) -> None:
        """Lanes (n,) bool start again from their best state, without a history; at last they are abandoned.

        A lane that exploded does without the preconditioner at once, others from their second restart on.

        Args:
            lanes: which lanes.
            far: (n,) bool, lanes that are far from their best state.
            manner: how they go on.
        """
        number = self.restarts + lanes
        self.plain = self.plain | (lanes & far) | (number >= 2)
        self.tau, self.alone = manner.tau[number], manner.alone[number]
        self.restarts = number
        self.restarted = self.restarted | lanes
        self.since_best = self.since_best * ~lanes
        abandoned = lanes & (number > MAX_RESTARTS)
        self.abandoned = self.abandoned | abandoned
        self.moving = self.moving > abandoned  # and not abandoned

    @fused
    def recheck(self, distance: Array, size: Array, passed: Array, tau: Any) -> Array:
        """Look again at every lane, since what a lane depends on may have moved: a frozen one that does not
        pass any more is woken.

        A woken lane starts again without a history: its old residuals belong to another equation. What was
        known of the others is renewed: unless a lane is far from its best state by now, its state now is the
        better one. That it is no progress still counts against its patience.

        Args:
            distance, size, passed: as for `judge`.
            tau: step length of a woken lane.
        Returns:
            (n,) bool, the moving lanes whose best state is to be the one just evaluated.
        """
        xp, best = namespace(distance), self.best_distance
        unchanged = (distance == best) | (
            abs(distance - best) <= MOVED * best
        )  # the former where both are inf
        self.abandoned = self.abandoned & ~passed & unchanged  # of another equation
        woken = ~self.moving & ~passed & ~self.abandoned
        resting = ~self.moving & passed
        # Never worse than the first state: or a lane that grows by less at a time would drift away.
        bound = xp.minimum(10 * best, self.first_distance)
        stale = self.moving & ~passed & (distance >= best) & (distance <= bound)
        known = resting | stale
        self.best_size = xp.where(known, size, self.best_size)
        self.best_distance = xp.where(woken, inf, xp.where(known, distance, best))
        self.first_distance = xp.where(woken, inf, self.first_distance)
        self.peak_distance = xp.where(woken, 0.0, self.peak_distance)
        self.since_best = self.since_best * ~woken
        self.restarts = self.restarts * ~woken
        self.tau = xp.where(woken, tau, self.tau)
        self.plain = self.plain & ~woken
        self.alone = self.alone & ~woken
        self.restarted = self.restarted | woken
        self.moving = self.moving | woken
        return stale

    def residual(self) -> Array:
        """|f(z) - z| / |f(z)| at the best state of every lane, (n,)."""
        xp = namespace(self.tau)
        size = xp.where(self.best_size > 1e-30, self.best_size, 1e-30)
        return self.best_distance / size

    def status(self, patience: int) -> Array:
        """The `Status` of every lane, (n,) integers."""
        xp = namespace(self.tau)
        stuck = self.abandoned | (self.since_best > patience // 2)
        # A lane that ends at its best state may have got there by restarts only: see how far it went.
        limit = DIVERGED * self.first_distance
        grown = (self.peak_distance > limit) & (self.best_distance >= self.first_distance)
        status = self.evaluations * 0 + int(Status.MAX_ITER)
        for where, ended in (
            (stuck, Status.STALLED),
            ((stuck & grown) | (self.last_distance > limit), Status.DIVERGED),
            ((stuck & (self.peak_distance == inf)) | (self.last_distance == inf), Status.NON_FINITE),
            (~self.moving & ~self.abandoned, Status.CONVERGED),
        ):
            status = xp.where(where, int(ended), status)
        return status
