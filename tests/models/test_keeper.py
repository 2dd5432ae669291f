"""The Jacobian penalty that keeps solves short."""

import pytest
import torch

from fairseq_deq.equilibrium import SolveStats
from fairseq_deq.models.keeper import ConvergenceKeeper
from fairseq_deq.solvers import FixedPoint, Status


def _stats(evaluations, failed=()):
    """Of one solve: how long each lane moved, and which did not converge."""
    lanes = torch.tensor(evaluations)
    status = torch.full(lanes.shape, int(Status.CONVERGED), dtype=torch.uint8)
    status[list(failed)] = int(Status.MAX_ITER)
    stats = SolveStats.empty(lanes.device)
    stats.record(
        FixedPoint(
            state=torch.zeros(*lanes.shape, 2),
            residual=torch.zeros(lanes.shape),
            lane_nfe=lanes,
            status=status,
            nfe=int(lanes.max()),
            total_lane_nfe=int(lanes.sum()),
        )
    )
    return stats


def test_the_statistics_count_lanes_that_converged_soon():
    stats = _stats([5, 30, 31, 60, 12], failed=[4])
    lanes, *_, converged, soon = stats.sums.tolist()
    assert (lanes, converged, soon) == (5, 4, 2)


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        (_stats([10] * 8), _stats([30] * 8), 0.0),  # all in time
        (_stats([31, *[10] * 7]), _stats([10] * 8), 0.995 - 7 / 8),  # converged, but late
        (_stats([10] * 8), _stats([31, 31, *[10] * 6]), 0.995 - 6 / 8),  # the worse of the two counts
        (_stats([10] * 8, failed=[0]), _stats([10] * 8), 0.995 - 7 / 8),
        (_stats([10] * 8), SolveStats.empty(torch.device("cpu")), 0.0),  # no backward solve
    ],
)
def test_its_weight_grows_by_the_share_that_is_missing(forward, backward, expected):
    keeper = ConvergenceKeeper(0.995)
    for _ in range(40):  # the first updates do not count
        keeper.collect(_stats([10] * 8), _stats([10] * 8))
        keeper.renew()
    assert float(keeper.weight) == 0
    keeper.collect(forward, backward)
    keeper.renew()
    assert float(keeper.weight) == pytest.approx(expected)
