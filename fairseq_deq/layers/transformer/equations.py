"""The two halves of f: attention between positions, and everything that acts on each position alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...invariant_matmul import headwise, pad_rows
from ..sample_rows import SampleRows
from .positions import turned
from .segment import Segment
from .weights import KeysValues, TransformerWeights


def queries_keys_values(segment: Segment, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of a segment at z.

    Args:
        segment: everything that f reads besides z.
        rows: z as rows (B*T, C).
    Returns:
        queries with r_w and the factor 1/sqrt(D), (B, H, T', D); keys and values, those of the context first,
        (B, H, columns, D) each. With rotary positions queries and keys are rotated, and there is no r_w.
    """
    weights, shape = segment.weights, (segment.batch, segment.length, -1)
    normed = weights.normed(pad_rows(rows))
    query = F.linear(normed, weights.query)[: rows.shape[0]].view(shape)
    query = turned(query + segment.query_injection, segment.rotation)
    query = weights.split_heads(query)  # (B, H, T, D)
    query = segment.pad_queries(query) if segment.missing else query.contiguous()
    own = KeysValues.projected(weights, normed, segment.kv_injection, segment.rotation)
    return query, *segment.with_context(own, segment.context)


def attention_weights(segment: Segment, query: Tensor, keys: Tensor) -> Tensor:
    """softmax(A) before dropout, (B, H, T', columns), of the results of `queries_keys_values`."""
    scores = torch.matmul(query, keys.transpose(2, 3))
    if segment.relative is not None:
        scores = scores.add_(segment.by_key(headwise(query, segment.relative)))
    return scores.add_(segment.bias).softmax(-1)


def residual_stream(
    weights: TransformerWeights, rows: Tensor, attended: Tensor, injection: Tensor | None, samples: SampleRows
) -> Tensor:
    """The residual stream a + z, or a + z + u_h, (n, C), with a = drop(W_o attended).

    Args:
        weights: of the layer.
        rows: z, (n, C).
        attended: softmax(A) v, (n, H*D).
        injection: u_h, (n, C), or None.
        samples: which sample each row belongs to, for the dropout mask.
    """
    projected = F.linear(pad_rows(attended), weights.out, weights.out_bias)[: rows.shape[0]]
    stream = samples.masked(projected, weights.masks.hidden) + rows
    return stream if injection is None else stream + injection


def after_attention(
    weights: TransformerWeights, rows: Tensor, attended: Tensor, injection: Tensor | None, samples: SampleRows
) -> Tensor:
    """f at n positions, (n, C): everything that follows attention. Arguments as for `residual_stream`."""
    masks, n = weights.masks, rows.shape[0]
    h, normed = weights.before_ffn(residual_stream(weights, rows, attended, injection, samples))
    inner = weights.activation(F.linear(pad_rows(normed), weights.ffn_in, weights.ffn_in_bias))
    if masks.ffn_inner is not None:
        inner = pad_rows(samples.masked(inner[:n], masks.ffn_inner))
    o = samples.masked(F.linear(inner, weights.ffn_out, weights.ffn_out_bias)[:n], masks.ffn_outer)
    return weights.closed(h + o)
