"""The transposed Jacobian of the DEQ-Transformer layer, at all positions or at some.

For a vector lambda in the shape of f, the *adjoint* of an intermediate result y of f is (df/dy)^T lambda.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ...invariant_matmul import headwise, pad_rows
from ..dropout import apply_mask
from ..sample_rows import SampleRows
from .equations import attention_weights, queries_keys_values, residual_stream
from .norm import NormAt
from .packing import QueryPacking
from .positions import Rotation
from .segment import Segment
from .weights import TransformerWeights


@dataclass(frozen=True)
class _Rows:
    """The operations of f that act on each position alone, linearised at z: a row for each of n positions.

    These are the norms, the feed-forward part, the output projection of attention, and the projections of z.
    """

    last: NormAt | None  # the closing norm
    middle: NormAt  # the norm before the feed-forward part
    first: NormAt | None  # pre-norm: the norm before attention
    active: Tensor  # derivatives of the activation, times the dropout mask inside, (n, F or 2*F)
    hidden: Tensor | None  # dropout mask of a, (n, C)
    outer: Tensor | None  # dropout mask of F(h), (n, C)
    attended: Tensor  # softmax(A) v, (n, H*D)
    rotation: Rotation | None  # rotary positions: that of queries and keys

    def at(self, index: Tensor) -> _Rows:
        """The same for the positions with these indices, (n',)."""

        def pick(value: Tensor | NormAt | Rotation | None) -> Tensor | NormAt | Rotation | None:
            if isinstance(value, (NormAt, Rotation)):
                return value.rows(index)
            return None if value is None else value.index_select(0, index)

        return _Rows(*(pick(getattr(self, f.name)) for f in fields(self)))  # type: ignore[arg-type]

    def to_attention(self, weights: TransformerWeights, adjoint: Tensor) -> tuple[Tensor, Tensor]:
        """Go back from f through the feed-forward part to the result of attention.

        Args:
            weights: of the layer.
            adjoint: lambda, (n, C).
        Returns:
            the adjoint of the residual stream a + z, (n, C), and that of `attended`, (n, H*D).
        """
        n = adjoint.shape[0]
        outer = adjoint if self.last is None else self.last.transposed(adjoint)
        inner = F.linear(pad_rows(apply_mask(outer, self.outer)), weights.ffn_out.T)
        inner = weights.activation.transposed(inner, pad_rows(self.active))
        inner = F.linear(inner, weights.ffn_in.T)[:n]
        if weights.adds_to_stream:
            stream = outer + self.middle.transposed(inner)
        else:
            stream = self.middle.transposed(outer + inner)
        return stream, F.linear(pad_rows(apply_mask(stream, self.hidden)), weights.out.T)[:n]

    def to_state(
        self, weights: TransformerWeights, stream: Tensor, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """J^T lambda at these positions, (n, C).

        Args:
            weights: of the layer.
            stream: the adjoint of the residual stream, (n, C).
            query, keys, values: the adjoints of q, k and v, (n, H*D) each.
        """
        n = stream.shape[0]
        if self.rotation is not None:
            query, keys = self.rotation.back(query), self.rotation.back(keys)
        key_value = torch.cat([keys, values], 1)
        own = F.linear(pad_rows(query), weights.query.T) + F.linear(pad_rows(key_value), weights.key_value.T)
        if self.first is not None:
            return stream + self.first.transposed(own[:n])
        return stream + own[:n]


@dataclass(frozen=True)
class _Attention:
    """The attention, linearised at z: b samples with Q queries each."""

    query: Tensor  # (b, H, Q, D)
    keys: Tensor  # (b, H, S, D)
    values: Tensor  # (b, H, S, D)
    weights: Tensor  # softmax(A), before dropout, (b, H, Q, S)
    mask: Tensor | None  # attention dropout, (b, H, Q, S)
    relative: Tensor | None  # W_r R, (H, D, W); None: positions are rotary

    def scores(self, adjoint: Tensor, attended: Tensor) -> Tensor:
        """The adjoint of the scores A, (b, H, Q, S): back through values, dropout and softmax.

        Args:
            adjoint: that of `attended`, (b, H, Q, D).
            attended: softmax(A) v with dropout, (b, H, Q, D).
        """
        of_weights = apply_mask(torch.matmul(adjoint, self.values.transpose(2, 3)), self.mask)
        mean = torch.linalg.vecdot(adjoint, attended).unsqueeze(-1)
        return of_weights.sub_(mean).mul_(self.weights)

    def distances(self) -> Tensor | None:
        """A buffer of zeros for the adjoint of the scores by distance, (b, H, Q, W); None if rotary."""
        if self.relative is None:
            return None
        return self.weights.new_zeros(*self.weights.shape[:3], self.relative.shape[-1])

    def query_adjoint(self, scores: Tensor, by_distance: Tensor | None) -> Tensor:
        """The adjoint of q, (b, H, Q, D), from that of the scores, given by key and by distance."""
        query = torch.matmul(scores, self.keys)
        if self.relative is None or by_distance is None:
            return query
        return query.add_(headwise(by_distance, self.relative.transpose(1, 2)))


class TransformerAdjoint:
    """lambda -> J^T lambda + grad for the layer of `TransformerLayer`, J = df/dz at z, without autograd.

    Everything that does not depend on lambda is computed once, the attention weights included. `restrict`
    reuses it for some of the positions; autograd would have to evaluate f at these positions again.

    Args:
        segment: everything that f reads besides z.
        z: the state at which J is taken, (B, T, C).
        grad: the vector that is added, (B, T, C).
    """

    direction = -1  # each position depends on itself and on later ones
    holds_its_tensors = True

    @torch.no_grad()
    def __init__(self, segment: Segment, z: Tensor, grad: Tensor) -> None:
        self.segment, self.grad = segment, grad
        self.rows, self.attention = self._linearised(z.reshape(-1, z.shape[-1]))
        # Only the entries that `by_key` views are ever written; the others stay zero.
        self._by_distance = self.attention.distances()

    @torch.no_grad()
    def __call__(self, adjoint: Tensor) -> Tensor:
        """J^T lambda + grad, (B, T, C), of lambda (B, T, C)."""
        segment, weights = self.segment, self.segment.weights
        stream, of_attended = self.rows.to_attention(weights, adjoint.reshape(-1, adjoint.shape[-1]))
        of_attended, attended = (segment.to_heads(x) for x in (of_attended, self.rows.attended))
        attention = self.attention
        scores = attention.scores(of_attended, attended)
        if self._by_distance is not None:
            segment.by_key(self._by_distance).copy_(scores)
        query = segment.to_rows(attention.query_adjoint(scores, self._by_distance))
        own = slice(segment.memory, segment.memory + segment.length)
        mask = None if attention.mask is None else attention.mask[..., own]
        dropped = apply_mask(attention.weights[..., own], mask)
        keys = torch.matmul(scores[..., own].transpose(2, 3), attention.query)
        values = torch.matmul(dropped.transpose(2, 3), of_attended)
        product = self.rows.to_state(weights, stream, query, segment.to_rows(keys), segment.to_rows(values))
        return product.view_as(adjoint).add_(self.grad)

    @torch.no_grad()
    def restrict(
        self, adjoint: Tensor, positions: Tensor, value: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """The map at some positions, (n, C) -> (n, C), with lambda held at `adjoint` at all others.

        Args:
            adjoint: lambda, (B, T, C).
            positions: where the map is taken: sorted indices b*T + t, (n,).
            value: the map of `adjoint` at the positions, (n, C); None: it is computed.
        """
        width = adjoint.shape[-1]
        own = adjoint.reshape(-1, width).index_select(0, positions)
        if value is None:
            value = self(adjoint).reshape(-1, width).index_select(0, positions)
        return _Moved(_RestrictedAdjoint(self, positions), own, value)

    def _linearised(self, z: Tensor) -> tuple[_Rows, _Attention]:
        """Evaluate f at z, given as rows (B*T, C), and keep everything that J^T needs."""
        segment, weights, masks = self.segment, self.segment.weights, self.segment.weights.masks
        samples, n = SampleRows(segment.batch, segment.length), z.shape[0]
        query, keys, values = queries_keys_values(segment, z)
        mask = segment.attention_mask
        attention = attention_weights(segment, query, keys)
        attended = segment.to_rows(torch.matmul(apply_mask(attention, mask), values))
        injection = segment.residual_injection
        injection = None if injection is None else injection.flatten(0, 1)
        h = residual_stream(weights, z, attended, injection, samples)
        middle = weights.middle_norm.at(h)
        seen = middle.value
        inner, slopes = weights.activation.at(
            F.linear(pad_rows(seen), weights.ffn_in, weights.ffn_in_bias)[:n]
        )
        active = samples.masked(slopes, weights.activation.mask_of_slopes(masks.ffn_inner))
        inner = pad_rows(samples.masked(inner, masks.ffn_inner))
        outer = F.linear(inner, weights.ffn_out, weights.ffn_out_bias)[:n]
        outer = samples.masked(outer, masks.ffn_outer)
        outer += h if weights.adds_to_stream else seen
        last = None if weights.closing_norm is None else weights.closing_norm.at(outer)
        first = None if weights.attention_norm is None else weights.attention_norm.at(z)
        hidden, outside = (samples.spread(mask) for mask in (masks.hidden, masks.ffn_outer))
        rotation = None if segment.rotation is None else segment.rotation.repeated(segment.batch)
        rows = _Rows(last, middle, first, active, hidden, outside, attended, rotation)
        return rows, _Attention(query, keys, values, attention, mask, segment.relative)


class _Moved:
    """The affine map x -> product(x - origin) + value, where `product` is linear."""

    def __init__(self, product: Callable[[Tensor], Tensor], origin: Tensor, value: Tensor) -> None:
        self.product, self.origin, self.value = product, origin, value

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x - self.origin).add_(self.value)


class _RestrictedAdjoint:
    """lambda -> (the block of J^T that belongs to some positions) lambda, (n, C) -> (n, C)."""

    def __init__(self, whole: TransformerAdjoint, positions: Tensor) -> None:
        segment, attention = whole.segment, whole.attention
        self.segment, self.packing = segment, QueryPacking(positions, segment)
        packing = self.packing
        self.rows = whole.rows.at(positions)
        self.attended = packing.spread(self.rows.attended)
        mask = None if attention.mask is None else packing.of_queries(attention.mask)
        self.attention = _Attention(
            query=packing.of_queries(attention.query),
            keys=packing.of_samples(attention.keys),
            values=packing.of_samples(attention.values),
            weights=packing.of_queries(attention.weights),
            mask=mask,
            relative=attention.relative,
        )
        self.by_distance = self.attention.distances()
        # The columns of the scores whose keys are those of these positions, (b, H, Q, Q).
        column = (segment.memory + packing.query_time)[:, None, None, :]
        shape = (-1, packing.heads, packing.width, -1)
        self.own = column.expand(shape)
        dropped = apply_mask(self.attention.weights, mask)
        self.dropped = dropped.gather(-1, self.own).transpose(2, 3).contiguous()

    @torch.no_grad()
    def __call__(self, adjoint: Tensor) -> Tensor:
        weights, packing, attention = self.segment.weights, self.packing, self.attention
        stream, of_attended = self.rows.to_attention(weights, adjoint)
        of_attended = packing.spread(of_attended)
        scores = attention.scores(of_attended, self.attended)
        by_distance = self.by_distance
        if by_distance is not None:
            by_distance = packing.by_distance(scores, by_distance)
        query = packing.collect(attention.query_adjoint(scores, by_distance))
        keys = packing.collect(torch.matmul(scores.gather(-1, self.own).transpose(2, 3), attention.query))
        values = packing.collect(torch.matmul(self.dropped, of_attended))
        return self.rows.to_state(weights, stream, query, keys, values)
