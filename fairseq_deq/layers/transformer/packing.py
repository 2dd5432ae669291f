"""Some positions of a segment as queries of a batched attention, each sample filled up to the same number."""

from __future__ import annotations

import torch
from torch import Tensor

from ...invariant_matmul import padded_count
from .segment import Segment


class QueryPacking:
    """Arranges n positions as queries (b, H, Q): b samples that have any of them, with Q queries each.

    Q is a multiple of 16, as in `pad_rows`. Where a sample has fewer positions, dummy queries fill its row;
    they take part in every product, and their results are never read.

    Args:
        positions: sorted indices b*T + t, (n,).
        segment: the segment that they are positions of.
    Attributes:
        sample: the sample of each position, (n,).
        time: the t of each position, (n,).
        live: the samples that have such a position, (b,).
        row: the index of each position's sample in `live`, (n,).
        everyone: whether all samples are live.
        width: queries per row, Q.
        query_time: the t of each query, (b, Q); 0 for dummy queries.
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
        # For each query and key, the column of their distance. It has no meaning where the query does not see
        # the key; the mask of the scores hides these.
        offset = segment.length - 1 - self.query_time
        column = offset.unsqueeze(-1) + torch.arange(segment.columns, device=positions.device)
        self._column = column.clamp(max=segment.columns).unsqueeze(1)  # (b, 1, Q, columns)

    def spread(self, rows: Tensor) -> Tensor:
        """(n, H*D) -> (b, H, Q, D), with zeros at dummy queries."""
        padded = rows.new_zeros(self.rows * self.width, rows.shape[-1]).index_copy(0, self._slot, rows)
        return padded.view(self.rows, self.width, self.heads, -1).transpose(1, 2).contiguous()

    def collect(self, x: Tensor) -> Tensor:
        """(b, H, Q, D) -> (n, H*D)."""
        return x.transpose(1, 2).reshape(self.rows * self.width, -1).index_select(0, self._slot)

    def by_key(self, relative: Tensor) -> Tensor:
        """Scores by distance, (b, H, Q, W), rearranged by key, (b, H, Q, columns)."""
        return relative.gather(-1, self._column.expand(-1, self.heads, -1, -1))

    def by_distance(self, scores: Tensor, out: Tensor) -> Tensor:
        """The transpose of `by_key`: scores by key, rearranged by distance, (b, H, Q, W).

        Args:
            scores: (b, H, Q, columns), 0 where a query does not see a key.
            out: where to write, (b, H, Q, W): zeros, or what an earlier call returned.
        """
        return out.scatter_(-1, self._column.expand(-1, self.heads, -1, -1), scores.to(out.dtype))

    def of_samples(self, x: Tensor) -> Tensor:
        """The live samples (b, ...) of x (B, ...)."""
        return x if self.everyone else x.index_select(0, self.live)

    def of_queries(self, x: Tensor) -> Tensor:
        """The packed queries (b, H, Q, ...) of x (B or 1, H, T', ...), which has all queries."""
        samples, heads, times = x.shape[:3]
        head = torch.arange(heads, device=x.device).view(1, -1, 1)
        row = 0 if samples == 1 else self.live.view(-1, 1, 1)
        place = (row * heads + head) * times + self.query_time.unsqueeze(1)  # (b, H, Q)
        picked = x.reshape(-1, *x.shape[3:]).index_select(0, place.flatten())
        return picked.view(*place.shape, *x.shape[3:])
