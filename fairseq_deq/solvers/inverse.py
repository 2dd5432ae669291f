"""The estimate of the inverse Jacobian that follows from the solver's history at the end of a solve."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .loop import Loop
from .record import namespace
from .rows import to_index


def inverse_transpose(loop: Loop, vector: Tensor) -> Tensor:
    """The estimate of (I - J)^{-T} `vector`, with J the blocks of single lanes.

    Args:
        loop: a solve that has ended, and that has kept its histories.
        vector: shaped as the state.
    Returns:
        likewise.
    """
    assert loop.frozen_histories is not None
    active = loop.active
    rows = loop.lanes.flatten(vector).to(active.z.dtype)
    transposed = _identity if loop.preconditioner is None else loop.preconditioner.transposed
    estimate = rows.clone()
    moving = namespace(active.record.tau).where(active.record.moving)[0]
    live = (active.lanes_at(moving), active.method.subset(moving))
    for lanes, method in (*loop.frozen_histories, live):  # what a lane knew when it was last frozen
        own = rows.index_select(0, to_index(lanes, rows))
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            product = method.inverse_transpose(own, transposed)
        sound = torch.isfinite(product).all(1, keepdim=True)
        estimate.index_copy_(0, to_index(lanes, rows), torch.where(sound, product, own))
    return loop.lanes.unflatten(estimate).to(vector.dtype)


def _identity(rows: Tensor) -> Tensor:
    return rows
