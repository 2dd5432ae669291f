"""The DEQ-TrellisNet layer at some positions only."""

from __future__ import annotations

import torch
from torch import Tensor

from ...invariant_matmul import rowwise_linear
from ..dropout import apply_mask
from .segment import TrellisSegment, gated


class RestrictedTrellis:
    """f at some positions, (n, C) -> (n, C); all other positions keep their states at z.

    Args:
        segment: everything that does not depend on z.
        z: the state, (B, T, C).
        positions: sorted indices b*T + t, (n,).
    """

    def __init__(self, segment: TrellisSegment, z: Tensor, positions: Tensor) -> None:
        self.weights, self.width = segment.weights, segment.width
        n, length, reach = positions.numel(), segment.length, segment.weights.reach
        sample, time = positions // length, positions % length
        mask = segment.weights.masks.hidden
        self.mask = None if mask is None else mask[:, 0].index_select(0, sample)
        self.injection = segment.injection.flatten(0, 1).index_select(0, positions)
        self.keep = (
            None if segment.keep is None else segment.keep.flatten().index_select(0, positions).unsqueeze(1)
        )
        self.held = segment.windows(z).flatten(0, 1).index_select(0, positions)  # (n, kH)
        self.held_cell = segment.cells_before(z).flatten(0, 1).index_select(0, positions)
        # For each of the n positions and each tap, the row that the tap reads; n if that position is held.
        place = positions.new_full((segment.batch * length,), n)
        place[positions] = torch.arange(n, device=z.device)
        taps = torch.arange(reach, -1, -1, device=z.device)
        seen = (positions.unsqueeze(1) - taps).clamp(min=0)  # (n, k)
        moving = place[seen].masked_fill(time.unsqueeze(1) < taps, n)
        self.source = moving.clamp(max=n - 1)
        self.is_held = (moving == n).unsqueeze(-1)  # (n, k, 1)

    def __call__(self, rows: Tensor) -> Tensor:
        hidden, cell = rows.split(self.width, -1)
        hidden = apply_mask(hidden, self.mask)
        n = hidden.shape[0]
        held = self.held.view(n, -1, self.width)
        windows = torch.where(self.is_held, held, hidden[self.source]).flatten(1)
        before = torch.where(self.is_held[:, -2], self.held_cell, cell[self.source[:, -2]])
        fz = gated(rowwise_linear(windows, self.weights.taps) + self.injection, before)
        return fz if self.keep is None else fz * self.keep
