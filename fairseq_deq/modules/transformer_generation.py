"""The DEQ-Transformer layer at one new position a row, against buffers of settled keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .transformer_bound import KeysValues, sinusoid
from .transformer_cell import PreparedCell

# Buffers grow to this many positions, or by a quarter.
_LEAST_CAPACITY = 64


@dataclass(frozen=True)
class TokenWeights:
    """The weights of the layer, transposed, (in, out), and its biases.

    On the CPU a product with a few rows is up to twice as fast with the transpose in memory as with a view.
    """

    qkv: Tensor
    out: Tensor
    ffn_in: Tensor
    ffn_out: Tensor
    out_bias: Tensor
    ffn_in_bias: Tensor
    ffn_out_bias: Tensor

    @classmethod
    def of(cls, prepared: PreparedCell) -> TokenWeights:
        """Those of `prepared`."""
        qkv = torch.cat([prepared.query, prepared.key_value])
        weights = (qkv, prepared.out, prepared.ffn_in, prepared.ffn_out)
        on_cpu = qkv.device.type == "cpu"
        transposed = (weight.t().contiguous() if on_cpu else weight.t() for weight in weights)
        cell = prepared.cell
        biases = (linear.bias for linear in (cell.out, cell.ffn_in, cell.ffn_out))
        return cls(*transposed, *(bias for bias in biases if bias is not None))


class SettledKeysValues:
    """Keys and values of settled positions in buffers that grow (see `Settled`).

    Attributes:
        keys: (H, B, D, capacity); the first `length` columns count.
        values: (H, B, capacity, D).

    With T new positions of one row each f is the `BoundCell` of the whole sequence. For T = 1 it is a
    `TokenCell`, which evaluates the same equations without a copy of the keys and values.

    Args:
        prepared: the layer with the weights of this text, and no dropout.
        batch: number of rows.
    """

    def __init__(self, prepared: PreparedCell, batch: int) -> None:
        cell = prepared.cell
        self.prepared, self.cell, self.length, self.batch = prepared, cell, 0, batch
        self.inner = cell.heads * cell.head_dim
        self.weights = TokenWeights.of(prepared)
        self.key_value = self.weights.qkv[:, self.inner :]
        # u becomes the injection of the scaled query, which carries r_w as well.
        query_bias = cell.content_bias.flatten() * prepared.scale
        self.injection_scale = torch.cat(
            [torch.full_like(query_bias, prepared.scale), query_bias.new_ones(2 * self.inner)]
        )
        self.injection_bias = F.pad(query_bias, (0, 2 * self.inner))
        self.keys = query_bias.new_empty(cell.heads, batch, cell.head_dim, 0)
        self.values = query_bias.new_empty(cell.heads, batch, 0, cell.head_dim)
        self._set_distances(0)

    # ------------------------------------------------------------------ Settled

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        if injection.shape[1] == 1:
            self._reserve(1)
            return self._token_cell(injection[:, 0], padding)
        past = None
        if self.length:
            keys = self.keys[..., : self.length].permute(1, 0, 3, 2)  # (B, H, S, D)
            past = KeysValues(keys, self.values[:, :, : self.length].transpose(0, 1))
        return self.prepared.bind(injection, past, padding)

    def append(self, state: Tensor, injection: Tensor) -> None:
        count = state.shape[1]
        self._reserve(count)
        if count == 1:
            rows = state.reshape(self.batch, -1)
            normed = F.layer_norm(rows, rows.shape[-1:]) if self.cell.pre_norm else rows
            kv = torch.addmm(injection[:, 0, self.inner :], normed, self.key_value)
            own = kv.view(self.batch, 2, self.cell.heads, self.cell.head_dim).transpose(0, 2)  # (H, 2, B, D)
            self.keys[..., self.length] = own[:, 0]
            self.values[:, :, self.length] = own[:, 1]
        else:
            new, end = self.prepared.keys_values(state, injection), self.length + count
            self.keys[..., self.length : end] = new.keys.permute(1, 0, 3, 2)
            self.values[:, :, self.length : end] = new.values.transpose(0, 1)
        self.length += count

    def reorder(self, order: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(1, order), self.values.index_select(1, order)
        self.batch = order.numel()

    # ------------------------------------------------------------------ one position

    def _token_cell(self, u: Tensor, padding: Tensor | None) -> TokenCell:
        end = self.length + 1
        begin = max(0, end - self.cell.local_size) if self.cell.local_size else 0
        nearest = self.relative.shape[-1] - (end - begin)
        bias = self.by_distance[..., nearest:]
        if padding is not None:
            # A padded query still sees itself, so that no row of the softmax is empty.
            hidden = F.pad(padding[:, begin : end - 1], (0, 1), value=False)
            bias = bias.masked_fill(hidden, float("-inf"))
        return TokenCell(
            prepared=self.prepared,
            weights=self.weights,
            injection=torch.addcmul(self.injection_bias, u, self.injection_scale),
            keys=self.keys[..., begin:end],
            values=self.values[:, :, begin:end],
            relative=self.relative[..., nearest:],
            bias=bias,
        )

    def _reserve(self, count: int) -> None:
        """Make room for `count` more positions."""
        capacity = self.keys.shape[-1]
        if self.length + count <= capacity:
            return
        more = max(self.length + count, _LEAST_CAPACITY, capacity + capacity // 4) - capacity
        self.keys, self.values = F.pad(self.keys, (0, more)), F.pad(self.values, (0, 0, 0, more))
        self._set_distances(capacity + more)

    def _set_distances(self, capacity: int) -> None:
        """W_r R, (H, D, capacity), and ((r_r - r_w) . W_r R)/sqrt(D), (H, 1, capacity), nearest last."""
        cell = self.cell
        distance = torch.arange(capacity - 1, -1, -1, device=self.keys.device)
        table = F.linear(sinusoid(distance, cell.dim).to(self.keys.dtype), self.prepared.relative)
        self.relative = table.view(capacity, cell.heads, cell.head_dim).permute(1, 2, 0).contiguous()
        extra = (cell.position_bias - cell.content_bias) * self.prepared.scale
        self.by_distance = torch.bmm(extra.unsqueeze(1), self.relative)


class TokenCell:
    """f at the position after the settled ones, (B, 1, C) or (B, C) to the same shape.

    The position's own key and value change with z; they are written where they will stand when it is settled.

    Args:
        prepared: the layer.
        weights: its weights.
        injection: u with the factor and the bias of the query, (B, 3*H*D).
        keys, values: those before and, last, room for its own, (H, B, D, S + 1) and (H, B, S + 1, D).
        relative: W_r R, (H, D, S + 1), by position.
        bias: what the scores have that does not depend on z, (H, 1 or B, S + 1).
    """

    def __init__(
        self,
        prepared: PreparedCell,
        weights: TokenWeights,
        injection: Tensor,
        keys: Tensor,
        values: Tensor,
        relative: Tensor,
        bias: Tensor,
    ) -> None:
        self.prepared, self.weights, self.injection = prepared, weights, injection
        self.keys, self.values, self.relative, self.bias = keys, values, relative, bias
        self.own_key, self.own_value = keys[..., -1], values[:, :, -1]  # (H, B, D)
        self.flat_keys, self.flat_values = keys.flatten(0, 1), values.flatten(0, 1)

    def __call__(self, z: Tensor) -> Tensor:
        weights, cell = self.weights, self.prepared.cell
        heads, head_dim = cell.heads, cell.head_dim
        rows = z.reshape(-1, z.shape[-1])  # (B, C)
        n, width = rows.shape[0], rows.shape[-1:]
        normed = F.layer_norm(rows, width) if cell.pre_norm else rows
        qkv = torch.addmm(self.injection, normed, weights.qkv)
        query, key, value = qkv.view(n, 3, heads, head_dim).transpose(0, 2).unbind(1)  # (H, B, D)
        self.own_key.copy_(key)
        self.own_value.copy_(value)
        query = query.contiguous()
        scores = torch.baddbmm(self.bias, query, self.relative).view(heads * n, 1, -1)
        # Not in place: autocast does not reach such products, and the buffers have the type of the weights.
        scores = torch.baddbmm(scores, query.view(heads * n, 1, head_dim), self.flat_keys)
        attended = torch.bmm(scores.softmax(-1), self.flat_values)  # (H*B, 1, D)
        attended = attended.view(heads, n, head_dim).transpose(0, 1).reshape(n, -1)
        h = torch.addmm(weights.out_bias, attended, weights.out).add_(rows)
        if not cell.pre_norm:
            h = F.layer_norm(h, width)
        inner = F.layer_norm(h, width) if cell.pre_norm else h
        inner = torch.addmm(weights.ffn_in_bias, inner, weights.ffn_in).relu_()
        out = torch.addmm(weights.ffn_out_bias, inner, weights.ffn_out).add_(h)
        return F.layer_norm(out, width).view_as(z)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None = None) -> TokenCell:
        """f at the rows `positions` (n,): (n, C) -> (n, C); no row looks at another."""
        return TokenCell(
            prepared=self.prepared,
            weights=self.weights,
            injection=self.injection.index_select(0, positions),
            keys=self.keys.index_select(1, positions),
            values=self.values.index_select(1, positions),
            relative=self.relative,
            bias=self.bias if self.bias.shape[1] == 1 else self.bias.index_select(1, positions),
        )
