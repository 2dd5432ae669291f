"""The DEQ-Transformer layer at some positions only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..solvers.invariant_matmul import ROW_MULTIPLE
from .dropout import apply_mask
from .rows import SampleRows, headwise, pad_rows, weighted

if TYPE_CHECKING:
    from .transformer_bound import BoundCell


class Slots:
    """Where some positions of some samples stand among padded queries, a sample a row.

    Args:
        positions: flat positions (n,), sorted, in (B, T).
        bound: the layer of the whole segment.
    Attributes:
        live: the samples that have such a position, (b,).
        row: for each position the place of its sample among those, (n,).
        time: for each position its t, (n,).
        width: queries of a row, Q.
        query_time: for every padded query its time, (b, Q); those that stand for nothing repeat time 0.
    """

    def __init__(self, positions: Tensor, bound: BoundCell) -> None:
        length, heads = bound.length, bound.p.cell.heads
        self.sample, self.time = positions // length, positions % length
        self.live, self.row = torch.unique_consecutive(self.sample, return_inverse=True)
        first = torch.searchsorted(self.sample.contiguous(), self.live)
        place = torch.arange(positions.numel(), device=positions.device) - first[self.row]
        width = int(place.max()) + 1
        most = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
        self.width = min(-(-width // ROW_MULTIPLE) * ROW_MULTIPLE, most)
        self.heads, self.rows = heads, self.live.numel()
        self.everyone = self.rows == bound.batch
        self._slot = self.row * self.width + place  # (n,)
        self.query_time = (
            self.time.new_zeros(self.rows * self.width)
            .index_copy(0, self._slot, self.time)
            .view(self.rows, self.width)
        )
        # For every padded query and key the column of the scores by distance; the mask hides what is no key.
        offset = bound.length - 1 - self.query_time
        column = offset.unsqueeze(-1) + torch.arange(bound.columns, device=positions.device)
        self._column = column.clamp(max=bound.columns).unsqueeze(1)  # (b, 1, Q, columns)

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


class RestrictedTransformer:
    """f at some positions; the keys and values of all others are those of the state it was made from.

    Args:
        bound: the layer of the whole segment.
        z: the state, (B, T, C).
        positions: flat positions (n,), sorted.
    """

    def __init__(self, bound: BoundCell, z: Tensor, positions: Tensor) -> None:
        self.bound, self.slots = bound, Slots(positions, bound)
        slots = self.slots
        self.samples = SampleRows(bound.batch, 1, slots.sample)
        self.query_injection, self.kv_injection = (
            u.reshape(-1, u.shape[-1]).index_select(0, positions)
            for u in (bound.query_injection, bound.kv_injection)
        )
        settled = bound.keys_values(z, None if slots.everyone else slots.live)
        past = bound.past
        if past is not None and not slots.everyone:
            past = past.rows(slots.live)
        keys, values = bound.with_past(settled.keys, settled.values, past)
        self.shape = keys.shape  # (b, H, columns, D)
        self.keys, self.values = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
        head = torch.arange(keys.shape[1], device=z.device)
        place = (slots.row.unsqueeze(1) * keys.shape[1] + head) * keys.shape[2]
        self.place = (place + bound.memory + slots.time.unsqueeze(1)).flatten()  # (n*H,), of own keys
        self.bias = slots.of_queries(bound.bias)
        mask = bound.attention_mask
        self.attention_mask = None if mask is None else slots.of_queries(mask)

    def __call__(self, rows: Tensor) -> Tensor:
        bound, p, slots = self.bound, self.bound.p, self.slots
        n = rows.shape[0]
        normed = bound.normed(pad_rows(rows))
        query = slots.spread(torch.nn.functional.linear(normed, p.query)[:n] + self.query_injection)
        own = torch.nn.functional.linear(normed, p.key_value)[:n] + self.kv_injection
        keys, values = (
            self._with_own(held, new) for held, new in zip((self.keys, self.values), own.chunk(2, -1))
        )
        scores = torch.matmul(query, keys.transpose(2, 3))
        scores = scores.add_(slots.by_key(headwise(query, bound.relative))).add_(self.bias)
        weights = apply_mask(scores.softmax(-1), self.attention_mask)
        return bound.after_attention(rows, slots.collect(weighted(weights, values)), self.samples)

    def _with_own(self, held: Tensor, new: Tensor) -> Tensor:
        """Keys or values of all positions, (b, H, columns, D), those evaluated (n, H*D) in their places."""
        new = new.reshape(-1, held.shape[-1])
        if torch.is_grad_enabled():
            return held.index_copy(0, self.place, new).view(self.shape)
        # Every evaluation overwrites the same rows, so that nobody sees what an earlier one left there.
        return held.index_copy_(0, self.place, new).view(self.shape)
