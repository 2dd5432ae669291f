"""The result of a solve that can be differentiated, and statistics over many such solves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .solvers import FixedPoint


@dataclass(frozen=True)
class SolveStats:
    """Sums over the lanes of one solve, as a tensor (6,) that a later backward pass can fill in.

    The entries are: lanes, evaluations of f weighted by lanes, lane-evaluations computed, relative
    residuals, converged lanes, and those of them that took at most `SOON` evaluations while they moved. All
    are zero while the solve has not run.

    Attributes:
        sums: the entries.
        real: (B, T) bool, False at padding, which does not count; None: every lane counts.
    """

    ENTRIES: ClassVar[int] = 6
    SOON: ClassVar[int] = 30

    sums: Tensor
    real: Tensor | None = None

    @classmethod
    def empty(cls, device: torch.device) -> SolveStats:
        return cls(torch.zeros(cls.ENTRIES, device=device))

    def at(self, real: Tensor) -> SolveStats:
        """The same sums, in which only the lanes that are `real` count."""
        return SolveStats(self.sums, real)

    def record(self, result: FixedPoint) -> None:
        """Add the sums of `result`."""
        converged, moving = result.converged, result.lane_nfe.double()
        residual = torch.nan_to_num(result.residual.double(), nan=1.0, posinf=1.0)
        soon = converged & (moving <= self.SOON)
        of_lanes = torch.stack(  # (5, ...)
            [torch.ones_like(moving), moving, residual, converged.double(), soon.double()]
        )
        if self.real is not None:
            everywhere, of_lanes = moving.sum(), of_lanes * real_lanes(self.real, converged)
        lanes, moved, residuals, passed, in_time = of_lanes.flatten(1).sum(1).unbind()
        # The share of the work that is not at padding, by how long each lane was moving.
        share = 1.0 if self.real is None else moved / everywhere.clamp(min=1)
        work = result.total_lane_nfe * share * torch.ones_like(lanes)
        self.sums.add_(
            torch.stack([lanes, result.nfe * lanes, work, residuals, passed, in_time]).to(self.sums)
        )


def real_lanes(real: Tensor, lanes: Tensor) -> Tensor:
    """Which lanes have a position that is not padding.

    Args:
        real: (B, T) bool, False at padding.
        lanes: any tensor of the lanes' shape: (B, T), (B,) or (1,).
    Returns:
        bool, shaped as `lanes`.
    """
    if lanes.shape == real.shape:
        return real
    return real.any(1) if lanes.numel() == real.shape[0] else real.any().reshape(1)


@dataclass(frozen=True)
class Equilibrium:
    """A fixed point that can be differentiated.

    Attributes:
        state: z*, shaped as z0, with the gradient mode that was asked for attached.
        result: the forward solve; None after `unroll`, which solves nothing.
        forward, backward: statistics of the two solves; `backward` fills when the backward pass runs.
        taped: f(z*) with its graph, and the leaf z* it was evaluated at; None without gradients, and after
            `unroll`.
    """

    state: Tensor
    result: FixedPoint | None
    forward: SolveStats
    backward: SolveStats
    taped: tuple[Tensor, Tensor] | None = None

    def explain(self) -> str:
        """How the forward solve ended, and the linear solve too once the backward pass has run."""
        if self.result is None:
            return "Forward: steps were unrolled, and nothing was solved. Backward: autograd through them."
        lanes, _, _, residuals, converged, _ = self.backward.sums.tolist()
        backward = "not run, or no linear solve was needed."
        if lanes:
            backward = (
                f"{converged:.0f} of {lanes:.0f} lanes converged, mean residual {residuals / lanes:.1e}."
            )
        return f"Forward: {self.result.explain()} Backward: {backward}"
