"""The weights of one forward pass of a DEQ-Transformer layer, and keys and values of settled positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...invariant_matmul import pad_rows
from .activation import Activation
from .norm import Norm
from .positions import RelativeWeights, Rotation, turned


@dataclass(frozen=True)
class DropoutMasks:
    """The dropout masks of one forward pass, which positions share; None where nothing is dropped."""

    hidden: Tensor | None = None  # of a, (B, C)
    ffn_inner: Tensor | None = None  # inside F(x), (B, F)
    ffn_outer: Tensor | None = None  # of F(x), (B, C)
    relative: Tensor | None = None  # of R, (1, C)
    attention: Tensor | None = None  # of each query and key, (B, H, T, M + T)


@dataclass(frozen=True)
class TransformerWeights:
    """The weights of one forward pass, (out, in), weight norm applied; `query` includes 1/sqrt(D)."""

    heads: int  # H
    head_dim: int  # D
    attention_norm: Norm | None  # of z, before attention; None: post-norm
    middle_norm: Norm  # before the feed-forward part
    closing_norm: Norm | None  # None: f = h + F(h) with h = LN(a + z)
    activation: Activation
    local_size: int  # positions that a query sees, itself included; 0: all up to itself
    query: Tensor  # (H*D, C)
    key_value: Tensor  # (2*H*D, C)
    out: Tensor  # W_o, (C, H*D)
    ffn_in: Tensor  # W_1, (F, C), or gated [W_1; W_3], (2*F, C)
    ffn_out: Tensor  # W_2, (C, F)
    out_bias: Tensor
    ffn_in_bias: Tensor
    ffn_out_bias: Tensor
    relative: RelativeWeights | None  # None: positions are rotary
    masks: DropoutMasks

    @property
    def scale(self) -> float:
        """1/sqrt(D)."""
        return self.head_dim**-0.5

    def rotation(self, first: int, count: int, like: Tensor) -> Rotation | None:
        """The rotation of queries and keys at `count` positions from `first` on; None: there is none."""
        return Rotation.of(first, count, self.head_dim, like) if self.relative is None else None

    @property
    def inner(self) -> int:
        """Channels of all heads, H*D."""
        return self.heads * self.head_dim

    def split_injection(self, injection: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The parts of u, (..., 3*H*D [+ C]): for the query, for key and value, and for the residual, u_h."""
        attention = 3 * self.inner
        residual = injection[..., attention:] if injection.shape[-1] > attention else None
        return injection[..., : self.inner], injection[..., self.inner : attention], residual

    @property
    def adds_to_stream(self) -> bool:
        """Whether h, to which F is added, is a + z; otherwise it is LN(a + z)."""
        return self.attention_norm is not None and self.closing_norm is not None

    def normed(self, rows: Tensor) -> Tensor:
        """The input of attention, (n, C): LN(z) in the pre-norm form, else z."""
        return rows if self.attention_norm is None else self.attention_norm(rows)

    def before_ffn(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h, to which the feed-forward part is added, and LN(a + z), which it reads, (n, C), from a + z."""
        normed = self.middle_norm(h)
        return (h if self.adds_to_stream else normed), normed

    def closed(self, rows: Tensor) -> Tensor:
        """f from h + F, (n, C): normalised where there is a closing norm."""
        return rows if self.closing_norm is None else self.closing_norm(rows)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, H*D) -> (B, H, S, D)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


@dataclass(frozen=True)
class KeysValues:
    """The context of a segment: keys and values of settled positions, (B, H, S, D) each.

    Keys of rotary positions are already rotated, as those of positions 0 to S-1.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, weights: TransformerWeights, state: Tensor, injection: Tensor, rotation: Rotation | None
    ) -> KeysValues:
        """The keys and values of S positions.

        Args:
            weights: of the layer.
            state: their states, (B, S, C).
            injection: the part of their injections for keys and values, (B, S, 2*H*D).
            rotation: of their positions; None: there is none.
        """
        normed = weights.normed(pad_rows(state.reshape(-1, state.shape[-1])))
        return cls.projected(weights, normed, injection, rotation)

    @classmethod
    def projected(
        cls, weights: TransformerWeights, normed: Tensor, injection: Tensor, rotation: Rotation | None
    ) -> KeysValues:
        """The same from the input of attention, (n, C), n >= B*S, of which the first B*S rows are used."""
        kv = F.linear(normed, weights.key_value)[: injection.shape[:2].numel()]
        keys, values = (kv.view(injection.shape) + injection).chunk(2, -1)
        return cls(weights.split_heads(turned(keys, rotation)), weights.split_heads(values))

    @property
    def length(self) -> int:
        """Number of positions, S."""
        return self.keys.shape[2]

    def followed_by(self, other: KeysValues) -> KeysValues:
        """These positions and then those of `other`."""
        return KeysValues(torch.cat([self.keys, other.keys], 2), torch.cat([self.values, other.values], 2))

    def rows(self, index: Tensor) -> KeysValues:
        """The samples with these indices, (B',), in that order."""
        return KeysValues(self.keys.index_select(0, index), self.values.index_select(0, index))
