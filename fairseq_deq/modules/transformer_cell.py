"""The DEQ-Transformer layer: relative attention and feed-forward with the input injected into q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..solvers.loop import ROW_MULTIPLE
from .dropout import apply_mask, variational_mask
from .rows import SampleRows, headwise, pad_rows, weighted
from .transformer_adjoint import TransformerAdjoint
from .transformer_restricted import RestrictedTransformer
from .weight_norm import Initializer, WeightNormLinear


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


class TransformerCell(nn.Module):
    """One Transformer-XL layer f(z; u), to be solved for z = f(z; u).

    With [q, k, v] = W_qkv z + u over memory and segment,
        A_ij = ((q_i + r_w) . k_j + (q_i + r_r) . (W_r R_{i-j})) / sqrt(D), j <= i,
        a = drop(W_o softmax(A) v),
    post-norm:  h = LN(a + z),  f = LN(h + drop(W_2 drop(relu(W_1 h)))),
    pre-norm:   h = a + z with attention on LN(z),  f = LN(h + drop(W_2 drop(relu(W_1 LN(h))))).
    LN has no affine parameters. The closing LN of the pre-norm form bounds f, so that an equilibrium exists.

    Args:
        dim: channels of z, C.
        ffn_dim: channels of the feed-forward part.
        heads: attention heads, H.
        head_dim: channels of a head, D.
        pre_norm: which of the two forms.
        weight_norm: whether the five matrices W are weight-normalised.
        dropout: probability of the variational dropouts (hidden, both places; relative positions).
        attention_dropout: probability of dropping attention weights.
        local_size: positions a query looks back at most, 0 for no limit.
    Source: Dai et al. (2019, arXiv 1901.02860); Bai, Kolter, Koltun (2019, arXiv 1909.01377).
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        head_dim: int,
        pre_norm: bool,
        weight_norm: bool,
        dropout: float,
        attention_dropout: float,
        local_size: int,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.pre_norm, self.local_size = pre_norm, local_size
        self.dropout, self.attention_dropout = dropout, attention_dropout
        inner = heads * head_dim
        self.qkv = WeightNormLinear(dim, 3 * inner, bias=False, weight_norm=weight_norm)
        self.relative = WeightNormLinear(dim, inner, bias=False, weight_norm=weight_norm)
        self.out = WeightNormLinear(inner, dim, bias=True, weight_norm=weight_norm)
        self.ffn_in = WeightNormLinear(dim, ffn_dim, bias=True, weight_norm=weight_norm)
        self.ffn_out = WeightNormLinear(ffn_dim, dim, bias=True, weight_norm=weight_norm)
        self.content_bias = nn.Parameter(torch.zeros(heads, head_dim))  # r_w
        self.position_bias = nn.Parameter(torch.zeros(heads, head_dim))  # r_r

    @property
    def state_dim(self) -> int:
        """Channels of the state z, C."""
        return self.dim

    @property
    def output_dim(self) -> int:
        """Channels that the softmax sees."""
        return self.dim

    @property
    def injection_dim(self) -> int:
        """Channels of the injection u."""
        return 3 * self.heads * self.head_dim

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax sees: the states (B, T, C) themselves."""
        return state

    def remembered(self, mem_len: int) -> int:
        """Positions to keep where `mem_len` are asked for."""
        return mem_len

    def initialize(self, initializer: Initializer) -> None:
        """Draw every weight from `initializer`; biases of linear maps start at 0."""
        for linear in (self.qkv, self.relative, self.out, self.ffn_in, self.ffn_out):
            linear.initialize(initializer)
        with torch.no_grad():
            initializer.fill(self.content_bias)
            initializer.fill(self.position_bias)

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> DropoutMasks:
        """Draw the masks of one forward pass, to be held through every solve in it.

        Args:
            batch, length, memory: rows, positions and remembered positions, B, T and M.
            like: a tensor of the device and dtype to use.
        """

        def mask(p: float, *shape: int) -> Tensor | None:
            return variational_mask(like, shape, p, self.training)

        return DropoutMasks(
            hidden=mask(self.dropout, batch, self.dim),
            ffn_inner=mask(self.dropout, batch, self.ffn_in.weight_v.shape[0]),
            ffn_outer=mask(self.dropout, batch, self.dim),
            relative=mask(self.dropout, 1, self.dim),
            attention=mask(self.attention_dropout, batch, self.heads, length, length + memory),
        )

    def prepare(self, masks: DropoutMasks) -> PreparedCell:
        """The weights of one forward pass: normalised once, scaled once."""
        scale = self.head_dim**-0.5
        inner = self.heads * self.head_dim
        qkv = self.qkv.weight()
        return PreparedCell(
            cell=self,
            masks=masks,
            query=qkv[:inner] * scale,
            key_value=qkv[inner:],
            relative=self.relative.weight(),
            out=self.out.weight(),
            ffn_in=self.ffn_in.weight(),
            ffn_out=self.ffn_out.weight(),
            scale=scale,
        )


@dataclass(frozen=True)
class DropoutMasks:
    """Masks of one forward pass; None where nothing is dropped. Rows are samples, shared by all positions."""

    hidden: Tensor | None  # (B, C)
    ffn_inner: Tensor | None  # (B, F)
    ffn_outer: Tensor | None  # (B, C)
    relative: Tensor | None  # (1, C)
    attention: Tensor | None  # (B, H, T, M + T)


@dataclass(frozen=True)
class PreparedCell:
    """A cell with the weights of one forward pass; `query` carries the factor 1/sqrt(D)."""

    cell: TransformerCell
    masks: DropoutMasks
    query: Tensor
    key_value: Tensor
    relative: Tensor
    out: Tensor
    ffn_in: Tensor
    ffn_out: Tensor
    scale: float

    def keys_values(self, state: Tensor, injection: Tensor) -> KeysValues:
        """Keys and values of settled positions.

        Args:
            state: equilibria, (B, S, C).
            injection: their injections, (B, S, 3*H*D).
        """
        inner = self.cell.heads * self.cell.head_dim
        rows = pad_rows(state.reshape(-1, state.shape[-1]))
        normed = F.layer_norm(rows, rows.shape[-1:]) if self.cell.pre_norm else rows
        kv = F.linear(normed, self.key_value)[: state.shape[:-1].numel()].view_as(injection[..., inner:])
        keys, values = (kv + injection[..., inner:]).chunk(2, -1)
        return KeysValues(self.split_heads(keys), self.split_heads(values))

    def settled(self, state: Tensor, injection: Tensor, past: KeysValues | None) -> KeysValues:
        """Keys and values of settled positions, arguments as in `keys_values`, after those of `past`."""
        own = self.keys_values(state, injection)
        return own if past is None else past.followed_by(own)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, H*D) -> (B, H, S, D)."""
        return x.unflatten(-1, (self.cell.heads, self.cell.head_dim)).transpose(1, 2)

    def bind(
        self, injection: Tensor, past: KeysValues | None, padding: Tensor | None = None, start: int = 0
    ) -> BoundCell:
        """f(z) for one segment, with all that does not depend on z computed here, once.

        Args:
            injection: u of the segment, (B, T, 3*H*D).
            past: keys and values of the positions before the segment, (B, H, M, D) each.
            padding: (B, M + T) bool, True at positions that must not be attended to.
            start: where the segment begins among the positions that the masks were drawn for.
        """
        return BoundCell(self, injection, past, padding, start)


class BoundCell:
    """z -> f(z) over (B, T, C), for one segment; `restrict` evaluates it at some positions only."""

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
