"""Keeps solves converging in training, by a Jacobian penalty whose weight follows the share that converge."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..equilibrium import SolveStats
from .learned import Learned

logger = logging.getLogger(__name__)

# How fast the weight grows with what is missing, how much of it stays after an update, and its bounds.
_GAIN, _STAYS = 1.0, 0.98
_LEAST, _MOST = 1e-3, 0.5
# The first updates at the equilibrium do not count: solves of a layer that was never solved are hard.
_GRACE = 20
# Statistics that wait to be summed up, where nobody counts updates.
_MOST_WAITING = 64


class ConvergenceKeeper(Learned):
    """The weight w of the Jacobian penalty that keeps a share of the positions converging.

    After each update w <- 0.98*w + max(0, target - share), with `share` that of the positions that
    converged in it within 30 evaluations (`SolveStats.SOON`), in the forward or in the backward solve,
    whichever is less; below 0.001 it is 0, and it never exceeds 0.5. So the penalty is off as long as
    solves go well, and mild where it is on: a strong penalty costs loss.
    A budget above 30 lets slower positions converge too, while the penalty takes effect.

    Args:
        target: the share that should converge, in (0, 1).
    """

    weight: Tensor

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.told = False
        self._stats: list[SolveStats] = []

    def collect(self, *stats: SolveStats) -> None:
        """Keep the statistics of solves until the weight is renewed; a backward pass may fill them in.

        Args:
            stats: of the forward and of the backward solve.
        """
        if len(self._stats) >= _MOST_WAITING:
            self._sum_up()
        self._stats.extend(stats)

    def renew(self) -> None:
        self._sum_up()
        super().renew()

    def _sum_up(self) -> None:
        for forward, backward in zip(self._stats[::2], self._stats[1::2]):
            self._collect(torch.stack([forward.sums, backward.sums]).double())
        self._stats = []

    def _no_sums(self) -> tuple[Tensor, ...]:
        return (torch.zeros(2, SolveStats.ENTRIES, dtype=torch.float64, device=self.weight.device),)

    def _renew(self, *sums: Tensor) -> None:
        lanes, soon = sums[0][:, 0], sums[0][:, -1]  # (2,), forward and backward
        share = float((soon / lanes.clamp(min=1))[lanes > 0].min())
        if int(self.renewals) < _GRACE:
            return
        before = float(self.weight)
        weight = min(_STAYS * before + _GAIN * max(0.0, self.target - share), _MOST)
        weight = weight if weight >= _LEAST else 0.0
        if weight and not self.told:
            self.told = True
            logger.info(
                f"{share:.1%} of the positions converged within {SolveStats.SOON} evaluations, and "
                f"--keep-converged asks for {self.target:.1%}: a Jacobian penalty is added until that many "
                "do (column jac)"
            )
        self.weight.fill_(weight)
