"""Some positions of some samples, packed as queries of an attention with a row for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ...invariant_matmul import padded_count
from .segment import Segment


class QueryPacking:
    """Where some positions stand among padded queries (b, H, Q), one row for each sample that has any.

    Args:
        positions: flat positions (n,), sorted, in (B, T).
        segment: that they are positions of.
    Attributes:
        live: the samples that have such a position, (b,).
        row: for each position the place of its sample among those, (n,).
        time: for each position its t, (n,).
        width: queries per row, Q.
        query_time: for every padded query its time, (b, Q); those that stand for nothing repeat time 0.
    """

    def __init__(self, positions: Tensor, segment: Segment) -> None:
        length, heads = segment.length, segment.weights.heads
        self.sample, self.time = positions // length, positions % length
        self.live, self.row = torch.unique_consecutive(self.sample, return_inverse=True)
        first = torch.searchsorted(self.sample.contiguous(), self.live)
        place = torch.arange(positions.numel(), device=positions.device) - first[self.row]
        width = int(place.max()) + 1
        self.width = min(padded_count(width), padded_count(length))
        self.heads, self.rows = heads, self.live.numel()
        self.everyone = self.rows == segment.batch
        self._slot = self.row * self.width + place  # (n,)
        self.query_time = (
            self.time.new_zeros(self.rows * self.width)
            .index_copy(0, self._slot, self.time)
            .view(self.rows, self.width)
        )
        # For every padded query and key the column of the scores by distance; the mask hides what is no key.
        offset = segment.length - 1 - self.query_time
        column = offset.unsqueeze(-1) + torch.arange(segment.columns, device=positions.device)
        self._column = column.clamp(max=segment.columns).unsqueeze(1)  # (b, 1, Q, columns)

    def spread(self, rows: Tensor) -> Tensor:
        """(n, H*D) -> (b, H, Q, D), zeros at queries that stand for nothing."""
        padded = rows.new_zeros(self.rows * self.width, rows.shape[-1]).index_copy(0, self._slot, rows)
        return padded.view(self.rows, self.width, self.heads, -1).transpose(1, 2).contiguous()

    def collect(self, x: Tensor) -> Tensor:
        """(b, H, Q, D) -> (n, H*D)."""
        return x.transpose(1, 2).reshape(self.rows * self.width, -1).index_select(0, self._slot)

    def by_key(self, relative: Tensor) -> Tensor:
        """Scores by distance, (b, H, Q, W), by key, (b, H, Q, columns)."""
        return relative.gather(-1, self._column.expand(-1, self.heads, -1, -1))

    def by_distance(self, scores: Tensor, out: Tensor) -> Tensor:
        """The transpose: scores by key, (b, H, Q, columns), 0 where there is none, by distance.

        Args:
            scores: the scores.
            out: (b, H, Q, W), zeros, or what an earlier call returned.
        """
        return out.scatter_(-1, self._column.expand(-1, self.heads, -1, -1), scores.to(out.dtype))

    def of_samples(self, x: Tensor) -> Tensor:
        """Rows of the live samples, of a tensor over all samples."""
        return x if self.everyone else x.index_select(0, self.live)

    def of_queries(self, x: Tensor) -> Tensor:
        """The padded queries (b, H, Q, ...) of a tensor over all, (B or 1, H, T, ...)."""
        samples, heads, times = x.shape[:3]
        head = torch.arange(heads, device=x.device).view(1, -1, 1)
        row = 0 if samples == 1 else self.live.view(-1, 1, 1)
        place = (row * heads + head) * times + self.query_time.unsqueeze(1)  # (b, H, Q)
        picked = x.reshape(-1, *x.shape[3:]).index_select(0, place.flatten())
        return picked.view(*place.shape, *x.shape[3:])
