"""What a solve returns: the state and, for each lane, how the solve went."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor


class Status(IntEnum):
    """How the solve of one lane ended; `Status.X.sentence` explains it and says what to do."""

    CONVERGED = 0
    MAX_ITER = 1
    STALLED = 2
    DIVERGED = 3
    NON_FINITE = 4

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The residual is within atol + rtol*|f(z)|.",
    Status.MAX_ITER: "The evaluation budget ran out while the residual was still falling; raise max_evals.",
    Status.STALLED: "The residual stopped falling before it reached the tolerance; damp the step, change the "
    "solver, or accept a tolerance that this precision can reach.",
    Status.DIVERGED: "The residual grew far beyond its first value; the map may have no fixed point that "
    "this solver can reach: damp the step or regularise the Jacobian.",
    Status.NON_FINITE: "f returned NaN or infinity; look for overflow in the inputs or the weights.",
}


class ConvergenceError(RuntimeError):
    """A solve did not converge and its policy is `raise`."""


class ConvergenceWarning(UserWarning):
    """A solve fell back to another solver."""


@dataclass(frozen=True)
class FixedPoint:
    """The outcome of solving z = f(z).

    Attributes:
        state: best state found, finite wherever `z0` was, shaped as `z0`. After a single evaluation it is
            f(z0), where that did not converge.
        residual: |f(z) - z| / |f(z)| per lane, as last measured at `state`, or at z0 after a single
            evaluation; inf where f was never finite.
        lane_nfe: evaluations of f during which the lane was still moving.
        status: a `Status` per lane (uint8).
        nfe: evaluations of f in the solve, counting one at some lanes like one at all.
        total_lane_nfe: the lanes evaluated, summed over those evaluations: the work really done.

    The three lane tensors have the shape of the lanes: `(B, T)` in position scope, `(B,)` in sample
    scope, `(1,)` in batch scope.
    """

    state: Tensor
    residual: Tensor
    lane_nfe: Tensor
    status: Tensor
    nfe: int
    total_lane_nfe: int

    def followed_by(self, rest: FixedPoint) -> FixedPoint:
        """The outcome of `rest`, a solve that started from this state, with the evaluations of both."""
        return replace(
            rest,
            lane_nfe=self.lane_nfe + rest.lane_nfe,
            nfe=self.nfe + rest.nfe,
            total_lane_nfe=self.total_lane_nfe + rest.total_lane_nfe,
        )

    @property
    def converged(self) -> Tensor:
        """True where the lane converged, shaped as the lanes."""
        return self.status == Status.CONVERGED

    def count(self, status: Status) -> int:
        """Number of lanes that ended in `status`."""
        return int((self.status == status).sum())

    def explain(self) -> str:
        """One sentence per status that occurred, with the number of lanes it occurred in."""
        total = self.status.numel()
        return " ".join(
            f"{n} of {total} lanes {s.name}: {s.sentence}" for s in Status if (n := self.count(s))
        )


def worst_residual(result: FixedPoint) -> float:
    """Largest finite relative residual over the lanes (0 when there is none)."""
    finite = torch.where(torch.isfinite(result.residual), result.residual, torch.zeros_like(result.residual))
    return float(finite.max()) if finite.numel() else 0.0
