"""A warning when the solves of a training run stop converging."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ..equilibrium import SolveStats

logger = logging.getLogger(__name__)

# With fewer converged positions than this share, the gradient is not that of the equilibrium.
ENOUGH = 0.99
# How much more must fail to converge before it is said again.
_WORSE = 2.0
_SOLVES = {
    "f_conv": ("forward", "raise --f-thres, lower --lr, turn --wnorm on or add --jac-loss-weight"),
    "b_conv": ("backward", "raise --b-thres, try --b-solver gmres, lower --lr or add --jac-loss-weight"),
}


class ConvergenceWatch:
    """Averages the share of converged positions over a window of batches, and warns when it is low.

    It warns once, and again when at least twice as many positions fail as when it last did.

    Args:
        window: batches that are averaged over.
    """

    def __init__(self, window: int) -> None:
        self.window = max(1, window)
        self._kept: dict[str, list[torch.Tensor]] = {name: [] for name in _SOLVES}
        self._warned = dict.fromkeys(_SOLVES, 0.0)

    def add(self, stats: Mapping[str, SolveStats]) -> None:
        """Take the statistics of a training batch; its backward pass may still have to fill some in.

        Args:
            stats: by the name of the column, `f_conv` and `b_conv`.
        """
        for name, one in stats.items():
            # A window is looked at when the batch after it comes: all its backward passes have run by then,
            # and the numbers leave the device once.
            if len(self._kept[name]) == self.window:
                self._look(name, torch.stack(self._kept[name]).sum(0).tolist())
                self._kept[name].clear()
            self._kept[name].append(one.sums)

    def _look(self, name: str, sums: list[float]) -> None:
        lanes, converged = sums[0], sums[4]
        if lanes == 0:  # a stack, or no backward solve
            return
        share = converged / lanes
        failing = 1 - share
        if share >= ENOUGH or failing < _WORSE * self._warned[name]:
            return
        again = "has fallen further" if self._warned[name] else "is low"
        self._warned[name] = failing
        solve, advice = _SOLVES[name]
        logger.warning(
            "%s %s: %.1f%% of the positions converged in the %s solves of the last %d batches, and the "
            "gradient is not that of the equilibrium; %s",
            *(name, again, 100 * share, solve, self.window, advice),
        )
