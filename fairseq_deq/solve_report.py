"""How the solves of an evaluation ended: one line beside its numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor

from .equilibrium import Equilibrium, real_lanes
from .errors import OptionError
from .solvers import Status

logger = logging.getLogger(__name__)

# With fewer converged positions than this share, a number does not describe the equilibrium.
ENOUGH = 0.99


class SolveReport:
    """Adds up the solves of all models while its `with` block runs.

    Attributes:
        lanes: unknowns solved for, padding left out; 0 where no model has an equilibrium.
        converged: how many of them converged.
        residuals: sum of their relative residuals, 1 where f was never finite.
    """

    def __init__(self) -> None:
        self.lanes = self.converged = 0
        self.residuals = 0.0
        self._token: Token[SolveReport | None] | None = None

    def __enter__(self) -> SolveReport:
        self._token = _active.set(self)
        return self

    def __exit__(self, *_error: Any) -> None:
        assert self._token is not None
        _active.reset(self._token)

    @property
    def share(self) -> float:
        """Share of the unknowns that converged; NaN of none."""
        return self.converged / self.lanes if self.lanes else math.nan

    @property
    def residual(self) -> float:
        """Mean relative residual; NaN of none."""
        return self.residuals / self.lanes if self.lanes else math.nan

    def add(self, equilibrium: Equilibrium, real: Tensor) -> None:
        """Count a solve.

        Args:
            equilibrium: its result.
            real: (B, T) bool, False at padding.
        Raises:
            OptionError: f was not finite somewhere, so that nothing follows from the state.
        """
        result = equilibrium.result
        if result is None:  # a stack, or unrolled: there is a state, and no verdict on it
            failed = ~torch.isfinite(equilibrium.state).all(-1) & real
            count = int(real.sum())
        else:
            mask = real_lanes(real, result.status)
            failed = result.status.eq(Status.NON_FINITE) & mask
            count = int(mask.sum())
        if bool(failed.any()):
            raise OptionError(
                f"the layer is not finite at {int(failed.sum())} of {count} positions, so that they have no "
                "equilibrium and no score: look for NaN or huge numbers in the weights of the "
                "checkpoint that --path names, and evaluate without --fp16"
            )
        if result is not None:
            residual = torch.nan_to_num(result.residual[mask].double(), nan=1.0, posinf=1.0)
            self.lanes += count
            self.converged += int((result.converged & mask).sum())
            self.residuals += float(residual.sum())

    def sentence(self) -> str:
        """Share converged and mean residual, to be printed beside a perplexity; empty without solves."""
        if not self.lanes:
            return ""
        share = f"{100 * self.share:.2f}% of {self.lanes:,} positions converged"
        return f"{share}, mean residual {self.residual:.1e}"

    def log(self) -> None:
        """Log the sentence, and a warning where too few positions converged."""
        if not self.lanes:
            return
        logger.info("Solves: %s", self.sentence())
        if self.share < ENOUGH:
            logger.warning(
                "only %s: the numbers are not those of the equilibrium; allow more evaluations, for "
                "example by --model-overrides \"{'f_thres': 120}\"",
                self.sentence(),
            )


_active: ContextVar[SolveReport | None] = ContextVar("fairseq_deq_solve_report", default=None)


def report_solves(equilibria: Iterable[Equilibrium], real: Tensor) -> None:
    """Add the solves of a segment to the open report, if there is one.

    Args:
        equilibria: one per subsequence.
        real: (B, T) bool, False at padding, of the whole segment.
    """
    report = _active.get()
    if report is None:
        return
    start = 0
    for equilibrium in equilibria:
        stop = start + equilibrium.state.shape[1]
        report.add(equilibrium, real[:, start:stop])
        start = stop
