"""The DEQ-Transformer layer: relative attention and feed-forward with the input injected into q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import variational_mask
from .rows import pad_rows
from .transformer_bound import BoundCell, KeysValues
from .weight_norm import Initializer, WeightNormLinear


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
    def own_dim(self) -> int:
        """Channels through which a position depends on itself: all."""
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
