"""Keys and values of settled positions in buffers that grow with the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .positions import sinusoid
from .segment import Segment
from .token import RecordableToken, TokenTransformer, TokenWeights
from .weights import KeysValues, TransformerWeights
from .whole import BoundTransformer

# A buffer has room for a multiple of this many positions. A full one grows by a quarter or more.
_CAPACITY_MULTIPLE = 64


def fills_windows(device: torch.device) -> bool:
    """Whether f at a new position has unused columns, so that its shapes change rarely."""
    return device.type != "cpu"


class KVCache:
    """`LayerCache` of a DEQ-Transformer: one layer of keys and values, however many evaluations solves take.

    `bind` of T > 1 new positions gives the f of a segment. For T = 1 it gives a `TokenTransformer`, which
    evaluates the same equations without a copy of the keys and values.

    Attributes:
        keys: (H, B, D, capacity); the first `length` columns are in use.
        values: (H, B, capacity, D), likewise.

    Args:
        weights: of the layer, without dropout.
        batch: number of texts, B.
    """

    def __init__(self, weights: TransformerWeights, batch: int) -> None:
        self.layer, self.length, self.batch = weights, 0, batch
        self.weights = TokenWeights.of(weights)
        self.key_value = self.weights.qkv[:, weights.inner :]
        # u * injection_scale + injection_bias is [(u_q + r_w)/sqrt(D), u_k, u_v], as in `Segment`.
        query_bias = weights.query.new_zeros(weights.inner)
        if weights.relative is not None:
            query_bias = weights.relative.content_bias.flatten() * weights.scale
        self.injection_scale = torch.cat(
            [torch.full_like(query_bias, weights.scale), query_bias.new_ones(2 * weights.inner)]
        )
        self.injection_bias = F.pad(query_bias, (0, 2 * weights.inner))
        self.keys = query_bias.new_empty(weights.heads, batch, weights.head_dim, 0)
        self.values = query_bias.new_empty(weights.heads, batch, 0, weights.head_dim)
        self.relative: Tensor | None
        self._set_distances(0)

    # ------------------------------------------------------------------ LayerCache

    @property
    def nbytes(self) -> int:
        return 2 * self.keys[..., : self.length].nbytes

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        if injection.shape[1] == 1:
            self._reserve(1)
            return self._token(injection[:, 0], padding)
        context = None
        if self.length:
            keys = self.keys[..., : self.length].permute(1, 0, 3, 2)  # (B, H, S, D)
            context = KeysValues(keys, self.values[:, :, : self.length].transpose(0, 1))
        return BoundTransformer(Segment.of(self.layer, injection, context, padding, 0))

    def append(self, record: Tensor, injection: Tensor) -> None:
        count, layer = record.shape[1], self.layer
        self._reserve(count)
        rotation = layer.rotation(self.length, count, self.keys)
        if count == 1:
            normed = layer.normed(record.reshape(self.batch, -1))
            kv = torch.addmm(layer.split_injection(injection[:, 0])[1], normed, self.key_value)
            if rotation is not None:
                kv = torch.cat([rotation(kv[:, : layer.inner]), kv[:, layer.inner :]], 1)
            own = kv.view(self.batch, 2, layer.heads, layer.head_dim).transpose(0, 2)  # (H, 2, B, D)
            self.keys[..., self.length] = own[:, 0]
            self.values[:, :, self.length] = own[:, 1]
        else:
            new = KeysValues.of(layer, record, layer.split_injection(injection)[1], rotation)
            end = self.length + count
            self.keys[..., self.length : end] = new.keys.permute(1, 0, 3, 2)
            self.values[:, :, self.length : end] = new.values.transpose(0, 1)
        self.length += count

    def reorder(self, order: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(1, order), self.values.index_select(1, order)
        self.batch = order.numel()

    # ------------------------------------------------------------------ one position

    def _token(self, u: Tensor, padding: Tensor | None) -> TokenTransformer:
        """f at the next position, for its injection u, (B, 3*H*D [+ C])."""
        end, local = self.length + 1, self.layer.local_size
        begin, is_full = max(0, end - local) if local else 0, bool(local) and end >= local
        kind = RecordableToken if fills_windows(u.device) else TokenTransformer
        if kind is RecordableToken and not is_full:
            return self._filled_token(u, padding)
        bias, relative = self.by_distance[..., begin - end :], None
        if self.relative is not None:
            relative = self.relative[..., begin - end :]
        if padding is not None:
            # A padded query still sees itself, so that no row of the softmax is empty.
            hidden = F.pad(padding[:, begin : end - 1], (0, 1), value=False)
            bias = bias.masked_fill(hidden, float("-inf"))
        return self._token_of(kind, u, begin, end, relative, bias)

    def _filled_token(self, u: Tensor, padding: Tensor | None) -> TokenTransformer:
        """The same with unused columns between the settled positions and its own, up to a multiple of 64 or
        to the local size: f of the next tokens then has tensors of the same shapes, and one recorded graph
        serves them all."""
        columns = self.length + 1 + -(self.length + 1) % _CAPACITY_MULTIPLE
        columns = min(columns, self.layer.local_size or columns)
        column = torch.arange(columns, device=u.device)
        settled = column < self.length
        # The tables end with distance 0, which is also the one of its own column, the last.
        place = (column - self.length).masked_fill(~settled, 0) + (self.by_distance.shape[-1] - 1)
        hidden = ~settled & (column < columns - 1)
        if padding is not None:
            hidden = hidden | F.pad(padding[:, : self.length], (0, columns - self.length), value=False)
        bias = self.by_distance.index_select(-1, place).masked_fill(hidden, float("-inf"))
        relative = None if self.relative is None else self.relative.index_select(-1, place)
        return self._token_of(RecordableToken, u, 0, columns, relative, bias)

    def _token_of(
        self,
        kind: type[TokenTransformer],
        u: Tensor,
        begin: int,
        end: int,
        relative: Tensor | None,
        bias: Tensor,
    ) -> TokenTransformer:
        """f over the columns from `begin` to `end`."""
        layer = self.layer
        attention = u[:, : 3 * layer.inner]
        return kind(
            weights=self.weights,
            injection=torch.addcmul(self.injection_bias, attention, self.injection_scale),
            keys=self.keys[..., begin:end],
            values=self.values[:, :, begin:end],
            relative=relative,
            rotation=layer.rotation(self.length, 1, u),
            bias=bias,
            residual=layer.split_injection(u)[2],
        )

    def _reserve(self, count: int) -> None:
        """Make room for `count` more positions."""
        capacity = self.keys.shape[-1]
        if self.length + count <= capacity:
            return
        least = max(self.length + count, capacity + capacity // 4)
        more = least + -least % _CAPACITY_MULTIPLE - capacity
        self.keys, self.values = F.pad(self.keys, (0, more)), F.pad(self.values, (0, 0, 0, more))
        self._set_distances(capacity + more)

    def _set_distances(self, capacity: int) -> None:
        """Compute the tables by distance; their last column is distance 0.

        `relative` is W_r R, (H, D, capacity), and `by_distance` is ((r_r - r_w) . W_r R)/sqrt(D),
        (H, 1, capacity). With rotary positions `relative` is None and `by_distance` is zero,
        (1, 1, capacity).
        """
        layer, weights = self.layer, self.layer.relative
        if weights is None:
            self.relative, self.by_distance = None, self.keys.new_zeros(1, 1, capacity)
            return
        distance = torch.arange(capacity - 1, -1, -1, device=self.keys.device)
        dim = weights.matrix.shape[1]
        table = F.linear(sinusoid(distance, dim).to(self.keys.dtype), weights.matrix)
        self.relative = table.view(capacity, layer.heads, layer.head_dim).permute(1, 2, 0).contiguous()
        extra = (weights.position_bias - weights.content_bias) * layer.scale
        self.by_distance = torch.bmm(extra.unsqueeze(1), self.relative)
