"""Keeps training where its solves converge: a Jacobian penalty that follows the share of positions that do."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..implicit import SolveStats
from .learned import Learned

logger = logging.getLogger(__name__)

# The weight that the penalty starts with and ends at most at, and how it grows and falls at a renewal.
_FIRST, _MOST = 0.1, 10.0
_GROWTH, _FALL = 2.0, 0.8


class ConvergenceKeeper(Learned):
    """The weight w of the Jacobian penalty that keeps a share of the positions converging.

    Where fewer than `target` of the positions converged, in the forward or in the backward solve, w doubles
    (from 0.1 at first), else it falls by a fifth, and below 0.1 to 0. So it is off as long as solves go well,
    and as small as they allow where it is on.

    Args:
        target: the share, in (0, 1).
    """

    weight: Tensor

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self._stats: list[SolveStats] = []

    def collect(self, *stats: SolveStats) -> None:
        """Take note of solves, whose statistics may be filled in until the weight is renewed.

        Args:
            stats: of the forward and of the backward solve.
        """
        self._stats.extend(stats)

    def renew(self) -> None:
        for forward, backward in zip(self._stats[::2], self._stats[1::2]):
            self._collect(torch.stack([forward.sums, backward.sums]).double())
        self._stats = []
        super().renew()

    def _no_sums(self) -> tuple[Tensor, ...]:
        return (torch.zeros(2, SolveStats.ENTRIES, dtype=torch.float64, device=self.weight.device),)

    def _renew(self, *sums: Tensor) -> None:
        lanes, converged = sums[0][:, 0], sums[0][:, -1]  # (2,), forward and backward
        share = float((converged / lanes.clamp(min=1))[lanes > 0].min())
        before = float(self.weight)
        weight = max(_GROWTH * before, _FIRST) if share < self.target else _FALL * before
        weight = min(weight, _MOST) if weight >= _FIRST else 0.0
        if weight and not before:
            logger.info(
                f"{share:.1%} of the positions converge, and --keep-converged asks for {self.target:.1%}: a "
                "Jacobian penalty is switched on until they do"
            )
        self.weight.fill_(weight)
