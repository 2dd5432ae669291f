"""The data of one segment: weights, masks, context, injections and the z-independent part of the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...invariant_matmul import ROW_MULTIPLE, padded_count
from ..dropout import apply_mask
from .positions import RelativeWeights, Rotation, sinusoid
from .weights import KeysValues, TransformerWeights


@dataclass(frozen=True)
class Segment:
    """Everything that f reads besides z, for T positions of B samples.

    Queries and keys are filled up to T' and `columns`, multiples of 16, as in `pad_rows`. The additional ones
    are called dummy queries and dummy keys. Results of dummy queries are dropped, and the mask hides dummy
    keys.
    """

    weights: TransformerWeights
    context: KeysValues | None  # of the M positions before the segment
    batch: int  # B
    length: int  # T
    query_injection: Tensor  # (u_q + r_w)/sqrt(D), (B, T, H*D); rotary: without r_w
    kv_injection: Tensor  # (B, T, 2*H*D)
    residual_injection: Tensor | None  # u_h, (B, T, C)
    relative: Tensor | None  # W_r R, (H, D, W), from distance M+T-1 down to 0; W >= columns + 1
    rotation: Rotation | None  # of the positions M to M+T-1
    bias: Tensor  # z-independent part of the scores, -inf at hidden keys, (1 or B, 1 or H, T', columns)
    attention_mask: Tensor | None  # (B, H, T', columns)

    @classmethod
    def of(
        cls,
        weights: TransformerWeights,
        injection: Tensor,
        context: KeysValues | None,
        padding: Tensor | None,
        start: int,
    ) -> Segment:
        """The segment of injections (B, T, 3*H*D [+ C]); the other arguments as for `PreparedLayer.bind`."""
        batch, length = injection.shape[:2]
        memory = context.length if context is not None else 0
        query, key_value, residual = weights.split_injection(injection)
        total, columns = memory + length, padded_count(memory + length)
        relative, bias = _positions(weights, memory, length, injection, padding)
        mask = weights.masks.attention
        if mask is not None:
            end = mask.shape[-1] - mask.shape[-2] + start + length
            mask = mask[..., start : start + length, end - total : end]
            mask = F.pad(mask, (0, columns - total, 0, -length % ROW_MULTIPLE))
        if weights.relative is not None:  # r_w is added to q just as u_q is
            query = query + weights.relative.content_bias.flatten()
        return cls(
            weights=weights,
            context=context,
            batch=batch,
            length=length,
            query_injection=query * weights.scale,
            kv_injection=key_value,
            residual_injection=residual,
            relative=relative,
            rotation=weights.rotation(memory, length, injection),
            bias=bias,
            attention_mask=mask,
        )

    @property
    def memory(self) -> int:
        """Positions before the segment, M."""
        return self.context.length if self.context is not None else 0

    @property
    def columns(self) -> int:
        """Number of keys with the dummy keys: M + T rounded up to a multiple of 16."""
        return self.bias.shape[-1]

    @property
    def missing(self) -> int:
        """Number of dummy queries, T' - T."""
        return -self.length % ROW_MULTIPLE

    def pad_queries(self, x: Tensor) -> Tensor:
        """x (..., T, K) with zeros for the dummy queries, (..., T', K)."""
        return F.pad(x, (0, 0, 0, self.missing)) if self.missing else x

    def to_rows(self, x: Tensor) -> Tensor:
        """(B, H, T', D) -> (B*T, H*D)."""
        return x[:, :, : self.length].transpose(1, 2).reshape(self.batch * self.length, -1)

    def to_heads(self, rows: Tensor) -> Tensor:
        """(B*T, H*D) -> (B, H, T', D)."""
        x = self.weights.split_heads(rows.view(self.batch, self.length, -1))
        return self.pad_queries(x) if self.missing else x.contiguous()

    def own_keys_values(self, z: Tensor, live: Tensor | None = None) -> KeysValues:
        """Keys and values of the segment's own positions at z (B, T, C), of all samples or of `live` (b,)."""
        injection, rotation = self.kv_injection, self.rotation
        if live is not None:
            z, injection = z.index_select(0, live), injection.index_select(0, live)
        return KeysValues.of(self.weights, z, injection, rotation)

    def with_context(self, own: KeysValues, context: KeysValues | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, the segment and the dummy keys (zeros), (B, H, columns, D) each."""
        before = [] if context is None else [context]
        missing = self.columns - self.memory - self.length
        zeros = [own.keys.new_zeros(*own.keys.shape[:2], missing, own.keys.shape[3])] if missing else []
        if not before and not zeros:
            return own.keys, own.values
        return (
            torch.cat([*(c.keys for c in before), own.keys, *zeros], 2),
            torch.cat([*(c.values for c in before), own.values, *zeros], 2),
        )

    def by_key(self, by_distance: Tensor) -> Tensor:
        """A view of scores by distance, (B, H, T', W), as scores by key, (B, H, T', columns).

        Column j of the scores by distance belongs to distance M+T-1-j. Key j is at distance M+i-j from query
        i, so shifting row i by T-1-i columns puts the score of key j into column j
        (the relative shift of Transformer-XL).
        """
        queries, stride = by_distance.shape[2], by_distance.shape[3] - 1
        shifted = by_distance.flatten(2)[..., self.length - 1 :][..., : queries * stride]
        return shifted.unflatten(-1, (queries, stride))[..., : self.columns]


def _positions(
    weights: TransformerWeights, memory: int, length: int, like: Tensor, padding: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """`relative` and `bias` of a segment: W_r R, (H, D, W), and (1 or B, H, T', columns).

    W is at least columns + 1, because the shift of `by_key` reads past the last key; the mask hides what it
    reads there. With rotary positions `relative` is None, and `bias` is the mask alone, with H = 1.
    """
    total, columns, device = memory + length, padded_count(memory + length), like.device
    query = torch.arange(length, device=device).unsqueeze(1) + memory
    gap = query - torch.arange(total, device=device)  # (T, S)
    relative, bias = None, like.new_zeros(1, length, total)
    if weights.relative is not None:
        relative, by_distance = _by_distance(weights, weights.relative, total, columns, like)
        bias = by_distance[:, gap.clamp(min=0)]  # (H, T, S)
    hidden = gap < 0
    if weights.local_size:
        hidden = hidden | (gap >= weights.local_size)
    bias = bias.masked_fill(hidden, float("-inf")).unsqueeze(0)
    if padding is not None:
        # A padded query still sees itself, so that no row of the softmax is empty.
        blind = padding[:, None, None, :] & (gap != 0)
        bias = bias.masked_fill(blind, float("-inf"))
    bias = F.pad(bias, (0, columns - total), value=float("-inf"))
    return relative, F.pad(bias, (0, 0, 0, -length % ROW_MULTIPLE))


def _by_distance(
    weights: TransformerWeights, relative: RelativeWeights, total: int, columns: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """W_r R, (H, D, W), and ((r_r - r_w) . W_r R)/sqrt(D) from distance 0 on, (H, S)."""
    distance = torch.arange(total - 1, -1, -1, device=like.device)  # S-1 ... 0
    dim = relative.matrix.shape[1]
    table = apply_mask(sinusoid(distance, dim).to(like.dtype), weights.masks.relative)  # (S, C)
    table = F.pad(table, (0, 0, 0, columns + ROW_MULTIPLE - total))
    projected = F.linear(table, relative.matrix)
    projected = projected.unflatten(-1, (weights.heads, weights.head_dim)).permute(1, 2, 0)  # (H, D, W)
    # q + r_r = (q + r_w) + (r_r - r_w), where the second part is the same for every query.
    extra = ((relative.position_bias - relative.content_bias) * weights.scale).unsqueeze(1)  # (H, 1, D)
    return projected, torch.bmm(extra, projected).squeeze(1)[:, :total].flip(-1)
