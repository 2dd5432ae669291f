"""The books of a solve: what is entered for one lane, or one quantity, stays out of all others."""

from __future__ import annotations

import numpy as np
import torch

from fairseq_deq.solvers.record import LaneRecord


def test_the_best_residual_survives_a_worse_one_of_lanes_put_back():
    """After an evaluation at which all lanes come closer, the two are equal, and no one array."""
    record = LaneRecord.start(4, 1.0, torch.device("cpu"))
    record.judge(np.full(4, 0.5), np.ones(4), np.zeros(4, dtype=bool))
    index = np.array([1, 3])
    part = record.rows(index)
    part.judge(np.array([0.9, 0.8]), np.ones(2), np.zeros(2, dtype=bool))
    record.put(index, part)
    assert record.best_distance.tolist() == [0.5] * 4
    assert record.last_distance.tolist() == [0.5, 0.9, 0.5, 0.8]
