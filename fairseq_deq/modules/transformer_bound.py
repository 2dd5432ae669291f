"""The DEQ-Transformer layer for one segment: f as a function of the states alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..solvers.invariant_matmul import ROW_MULTIPLE
from .dropout import apply_mask
from .rows import SampleRows, headwise, pad_rows, weighted
from .transformer_adjoint import TransformerAdjoint
from .transformer_restricted import RestrictedTransformer

if TYPE_CHECKING:
    from .transformer_cell import PreparedCell


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of positions whose state is settled, each (B, H, S, D)."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Number of positions, S."""
        return self.keys.shape[2]

    def followed_by(self, other: KeysValues) -> KeysValues:
        """These positions and then those of `other`."""
        return KeysValues(torch.cat([self.keys, other.keys], 2), torch.cat([self.values, other.values], 2))

    def rows(self, index: Tensor) -> KeysValues:
        """The samples `index` (B',), in that order."""
        return KeysValues(self.keys.index_select(0, index), self.values.index_select(0, index))


class BoundCell:
    """z -> f(z) over (B, T, C), for one segment; `restrict` evaluates it at some positions only."""

    direction = 1  # a position depends on itself and on those before it

    def __init__(
        self,
        prepared: PreparedCell,
        injection: Tensor,
        past: KeysValues | None,
        padding: Tensor | None,
        start: int,
    ) -> None:
        cell = prepared.cell
        self.p, self.past = prepared, past
        self.batch, self.length = injection.shape[:2]
        self.memory = past.length if past is not None else 0
        inner = cell.heads * cell.head_dim
        # (q + r_w)/sqrt(D): the bias joins the injection of the (scaled) query.
        self.query_injection = (injection[..., :inner] + cell.content_bias.flatten()) * prepared.scale
        self.kv_injection = injection[..., inner:]
        # Queries and keys that stand for nothing make up the last multiple, as in `pad_rows`.
        self.columns = -(-(self.memory + self.length) // ROW_MULTIPLE) * ROW_MULTIPLE
        self.missing = -self.length % ROW_MULTIPLE
        self.relative, self.bias = self._positions(injection, padding)
        self.padded_bias = F.pad(self.bias, (0, 0, 0, self.missing)) if self.missing else self.bias
        attention = prepared.masks.attention
        if attention is not None:
            end = attention.shape[-1] - attention.shape[-2] + start + self.length
            attention = attention[..., start : start + self.length, end - self.memory - self.length : end]
            attention = F.pad(attention, (0, self.columns - attention.shape[-1]))
        self.attention_mask = attention
        self.padded_mask = (
            F.pad(attention, (0, 0, 0, self.missing)) if attention is not None and self.missing else attention
        )

    def __call__(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])  # (B*T, C)
        query, keys, values = self.project(rows)
        weights = apply_mask(self.weights(query, keys), self.padded_mask)
        attended = self.heads_to_rows(weighted(weights, values))
        return self.after_attention(rows, attended, SampleRows(self.batch, self.length)).view_as(z)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries (B, H, T', D), and keys and values (B, H, columns, D), at z as rows (B*T, C)."""
        normed = self.normed(pad_rows(rows))
        query = F.linear(normed, self.p.query)[: rows.shape[0]].view(self.batch, self.length, -1)
        query = self.p.split_heads(query + self.query_injection)  # (B, H, T, D)
        query = F.pad(query, (0, 0, 0, self.missing)) if self.missing else query.contiguous()
        own = self._own_keys_values(normed, self.kv_injection)
        return query, *self.with_past(own.keys, own.values, self.past)

    def weights(self, query: Tensor, keys: Tensor) -> Tensor:
        """What each query attends to, before dropout, (B, H, T', columns)."""
        scores = torch.matmul(query, keys.transpose(2, 3))
        scores = scores.add_(self.shifted(headwise(query, self.relative))).add_(self.padded_bias)
        return scores.softmax(-1)

    def shifted(self, relative: Tensor) -> Tensor:
        """The view of the scores by distance, (B, H, T', W), whose columns are keys, (B, H, T', columns).

        Column j of `relative` is distance M+T-1-j; shifting row i by T-1-i lines it up with key j.
        """
        queries, stride = relative.shape[2], relative.shape[3] - 1
        shifted = relative.flatten(2)[..., self.length - 1 :][..., : queries * stride]
        return shifted.unflatten(-1, (queries, stride))[..., : self.columns]

    def heads_to_rows(self, x: Tensor) -> Tensor:
        """(B, H, T', D) -> (B*T, H*D)."""
        return x[:, :, : self.length].transpose(1, 2).reshape(self.batch * self.length, -1)

    def adjoint(self, z: Tensor, grad: Tensor) -> TransformerAdjoint:
        """lambda -> J^T lambda + grad, with J = df/dz at z (B, T, C)."""
        return TransformerAdjoint(self, z, grad)

    def restrict(
        self, z: Tensor, positions: Tensor, value: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """f at the flat `positions` (n,), sorted, with the others held at z (B, T, C): (n, C) -> (n, C)."""
        return RestrictedTransformer(self, z, positions)

    def keys_values(self, z: Tensor, live: Tensor | None = None) -> KeysValues:
        """Keys and values of the segment's own positions at z (B, T, C), all samples or the `live`."""
        injection = self.kv_injection
        if live is not None:
            z, injection = z.index_select(0, live), injection.index_select(0, live)
        return self._own_keys_values(self.normed(pad_rows(z.reshape(-1, z.shape[-1]))), injection)

    def _own_keys_values(self, normed: Tensor, injection: Tensor) -> KeysValues:
        kv = F.linear(normed, self.p.key_value)[: injection.shape[:2].numel()]
        keys, values = (kv.view(injection.shape) + injection).chunk(2, -1)
        return KeysValues(self.p.split_heads(keys), self.p.split_heads(values))

    # ------------------------------------------------------------------ shared with the restricted cell

    def normed(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:]) if self.p.cell.pre_norm else rows

    def after_attention(self, rows: Tensor, attended: Tensor, samples: SampleRows) -> Tensor:
        """Output projection, residual, feed-forward: everything that stays within a position. (n, C)."""
        p, cell, masks = self.p, self.p.cell, self.p.masks
        n, width = rows.shape[0], rows.shape[-1:]
        a = samples.masked(F.linear(pad_rows(attended), p.out, cell.out.bias)[:n], masks.hidden)
        h = a + rows
        if not cell.pre_norm:
            h = F.layer_norm(h, width)
        inner = F.linear(pad_rows(self.normed(h)), p.ffn_in, cell.ffn_in.bias).relu_()
        if masks.ffn_inner is not None:
            inner = samples.masked(inner[:n], masks.ffn_inner)
            inner = pad_rows(inner)
        o = samples.masked(F.linear(inner, p.ffn_out, cell.ffn_out.bias)[:n], masks.ffn_outer)
        return F.layer_norm(h + o, width)

    def with_past(self, keys: Tensor, values: Tensor, past: KeysValues | None) -> tuple[Tensor, Tensor]:
        """The segment's keys and values after those of the past, and before those that stand for nothing."""
        before = [] if past is None else [past]
        missing = self.columns - self.memory - self.length
        zeros = [keys.new_zeros(*keys.shape[:2], missing, keys.shape[3])] if missing else []
        if not before and not zeros:
            return keys, values
        return (
            torch.cat([*(p.keys for p in before), keys, *zeros], 2),
            torch.cat([*(p.values for p in before), values, *zeros], 2),
        )

    def _positions(self, like: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """W_r R, (H, D, W), and the z-independent part of the scores with the mask, (1 or B, H, T, columns).

        W exceeds the number of columns by at least one: the shift of the scores reads past their end, where
        the mask hides what it finds.
        """
        p, cell = self.p, self.p.cell
        total, device = self.memory + self.length, like.device
        distance = torch.arange(total - 1, -1, -1, device=device)  # S-1 ... 0
        table = apply_mask(sinusoid(distance, cell.dim).to(like.dtype), p.masks.relative)  # (S, C)
        table = F.pad(table, (0, 0, 0, self.columns + ROW_MULTIPLE - total))
        relative = F.linear(table, p.relative).unflatten(-1, (cell.heads, cell.head_dim)).permute(1, 2, 0)
        # (q + r_r) = (q + r_w) + (r_r - r_w): the second part is the same for every query.
        extra = ((cell.position_bias - cell.content_bias) * p.scale).unsqueeze(1)  # (H, 1, D)
        by_distance = (
            torch.bmm(extra, relative).squeeze(1)[:, :total].flip(-1)
        )  # (H, S), by distance 0 ... S-1
        query = torch.arange(self.length, device=device).unsqueeze(1) + self.memory
        gap = query - torch.arange(total, device=device)  # (T, S)
        bias = by_distance[:, gap.clamp(min=0)]  # (H, T, S)
        hidden = gap < 0
        if cell.local_size:
            hidden = hidden | (gap >= cell.local_size)
        bias = bias.masked_fill(hidden, float("-inf")).unsqueeze(0)
        if padding is not None:
            # A padded query still sees itself, so that no row of the softmax is empty.
            blind = padding[:, None, None, :] & (gap != 0)
            bias = bias.masked_fill(blind, float("-inf"))
        return relative, F.pad(bias, (0, self.columns - total), value=float("-inf"))


def sinusoid(distance: Tensor, dim: int) -> Tensor:
    """[sin; cos] of distance over wavelengths 2*pi to 10000*2*pi, (len(distance), dim)."""
    inverse = 10000 ** (-torch.arange(0, dim, 2, device=distance.device, dtype=torch.float32) / dim)
    angle = distance.float().unsqueeze(1) * inverse
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :dim]
