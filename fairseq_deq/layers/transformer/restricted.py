"""The DEQ-Transformer layer at some positions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...invariant_matmul import headwise, pad_rows, weighted
from ..dropout import apply_mask
from ..sample_rows import SampleRows
from .equations import after_attention
from .packing import QueryPacking
from .positions import turned
from .segment import Segment


class RestrictedTransformer:
    """f at some positions, (n, C) -> (n, C); all other positions keep their keys and values at z.

    Args:
        segment: everything that does not depend on z.
        z: the state, (B, T, C).
        positions: sorted indices b*T + t, (n,).
    """

    def __init__(self, segment: Segment, z: Tensor, positions: Tensor) -> None:
        self.segment, self.packing = segment, QueryPacking(positions, segment)
        packing = self.packing
        self.samples = SampleRows(segment.batch, 1, packing.sample)
        self.query_injection, self.kv_injection = (
            u.reshape(-1, u.shape[-1]).index_select(0, positions)
            for u in (segment.query_injection, segment.kv_injection)
        )
        self.rotation = None if segment.rotation is None else segment.rotation.rows(packing.time)
        residual = segment.residual_injection
        self.injection = None if residual is None else residual.flatten(0, 1).index_select(0, positions)
        own = segment.own_keys_values(z, None if packing.everyone else packing.live)
        context = segment.context
        if context is not None and not packing.everyone:
            context = context.rows(packing.live)
        keys, values = segment.with_context(own, context)
        self.shape = keys.shape  # (b, H, columns, D)
        self.keys, self.values = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
        head = torch.arange(keys.shape[1], device=z.device)
        place = (packing.row.unsqueeze(1) * keys.shape[1] + head) * keys.shape[2]
        self.place = (place + segment.memory + packing.time.unsqueeze(1)).flatten()  # (n*H,), rows of `keys`
        self.bias = packing.of_queries(segment.bias)
        mask = segment.attention_mask
        self.attention_mask = None if mask is None else packing.of_queries(mask)

    def __call__(self, rows: Tensor) -> Tensor:
        segment, packing, weights = self.segment, self.packing, self.segment.weights
        n = rows.shape[0]
        normed = weights.normed(pad_rows(rows))
        query = F.linear(normed, weights.query)[:n] + self.query_injection
        query = packing.spread(turned(query, self.rotation))
        own = F.linear(normed, weights.key_value)[:n] + self.kv_injection
        own_keys, own_values = own.chunk(2, -1)
        keys = self._with_own(self.keys, turned(own_keys, self.rotation))
        values = self._with_own(self.values, own_values)
        scores = torch.matmul(query, keys.transpose(2, 3))
        if segment.relative is not None:
            scores = scores.add_(packing.by_key(headwise(query, segment.relative)))
        attention = apply_mask(scores.add_(self.bias).softmax(-1), self.attention_mask)
        attended = packing.collect(weighted(attention, values))
        return after_attention(weights, rows, attended, self.injection, self.samples)

    def _with_own(self, held: Tensor, new: Tensor) -> Tensor:
        """Keys or values of all positions, (b, H, columns, D), with those of the n positions replaced.

        Args:
            held: the keys or values, as rows.
            new: those of the n positions, (n, H*D).
        """
        new = new.reshape(-1, held.shape[-1])
        if torch.is_grad_enabled():
            return held.index_copy(0, self.place, new).view(self.shape)
        # In place: every evaluation overwrites the same rows, so nothing of an earlier one remains.
        return held.index_copy_(0, self.place, new).view(self.shape)
