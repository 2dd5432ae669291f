"""Whether it pays to evaluate f at some lanes only, from what evaluations have cost so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Weight of the newest measurement in a running mean.
_NEWEST = 0.5


class GatherCost:
    """Seconds that evaluations took in one solve, whole and restricted, and what restricting itself took.

    An evaluation at n of N lanes is taken to cost c*n/N whole ones. As long as nothing was restricted, c
    counts as 1, and restricting as one whole evaluation. Only speed depends on the answer.

    Args:
        lanes: number of lanes of a whole evaluation, N.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._whole: float | None = None
        self._restricting: float | None = None
        self._factor = 1.0  # c

    @contextmanager
    def evaluation(self, lanes: int) -> Iterator[None]:
        """Measure an evaluation at `lanes` lanes."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if lanes == self.lanes:
            # The first one pays for memory and caches that the others find ready.
            self._whole = seconds if self._whole is None else min(self._whole, seconds)
        elif self._whole is not None:
            self._factor += _NEWEST * (seconds / self._whole * self.lanes / lanes - self._factor)

    @contextmanager
    def restricting(self) -> Iterator[None]:
        """Measure the making of a restricted map."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._restricting = seconds if self._restricting is None else min(self._restricting, seconds)

    def of(self, lanes: int) -> float:
        """Expected seconds of an evaluation at `lanes` lanes."""
        factor = 1.0 if lanes == self.lanes else self._factor
        return (self._whole or 0.0) * factor * lanes / self.lanes

    def pays(self, now: int, then: int, evaluations: int) -> bool:
        """Whether to go from `now` to `then` lanes for the next `evaluations` evaluations."""
        saved = evaluations * (self.of(now) - self.of(then))
        price = self.of(self.lanes) if self._restricting is None else self._restricting
        return then < now and saved > price
