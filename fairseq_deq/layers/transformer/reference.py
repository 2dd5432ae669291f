"""The equations of the DEQ-Transformer layer as they are written on paper: slow, and easy to check.

Everything else in this folder computes the same, faster; the tests compare the two in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import apply_mask
from .activation import Activation
from .norm import Norm
from .positions import sinusoid
from .weights import TransformerWeights


def reference(
    z: Tensor, u: Tensor, weights: TransformerWeights, before: int = 0, padding: Tensor | None = None
) -> Tensor:
    """f(z; u) over a whole text.

    Args:
        z: states of all positions, (B, S, C); those of the context come first.
        u: their injections, (B, S, 3*H*D), or with the part u_h of the residual (B, S, 3*H*D + C).
        weights: of the layer, with its dropout masks; its `query` contains the factor 1/sqrt(D).
        before: number of positions of the context, at which f is not computed.
        padding: (B, S) bool, True at positions that no other position sees; None: there are none.
    Returns:
        f at the positions after the context, (B, S - before, C).
    """
    batch, total, dim = z.shape
    heads, head_dim, masks = weights.heads, weights.head_dim, weights.masks
    scale = head_dim**-0.5
    inner_dim = heads * head_dim
    u_query, u_key, u_value, u_h = u.split([inner_dim] * 3 + [u.shape[-1] - 3 * inner_dim], -1)
    seen = _normed(z, weights.attention_norm)

    # q, k, v of every position, (B, S, H, D).
    w_key, w_value = weights.key_value.chunk(2, 0)
    query = (seen @ (weights.query / scale).T + u_query).view(batch, total, heads, head_dim)
    key = (seen @ w_key.T + u_key).view(batch, total, heads, head_dim)
    value = (seen @ w_value.T + u_value).view(batch, total, heads, head_dim)
    by_distance = weights.relative
    if by_distance is None:
        query, key = _turned(query), _turned(key)
    else:
        # W_r R at distances 0 ... S-1, (S, H, D).
        table = apply_mask(sinusoid(torch.arange(total), dim).to(z), masks.relative)
        relative = (table @ by_distance.matrix.T).view(total, heads, head_dim)

    attended = []
    for i in range(before, total):  # position of the query
        first = max(0, i + 1 - weights.local_size) if weights.local_size else 0
        keys = range(first, i + 1)  # itself and those before it
        scores = []
        for j in keys:
            score = (query[:, i] * key[:, j]).sum(-1) * scale  # (B, H)
            if by_distance is not None:
                score = score + (by_distance.content_bias * key[:, j]).sum(-1) * scale
                position = ((query[:, i] + by_distance.position_bias) * relative[i - j]).sum(-1)
                score = score + position * scale
            if padding is not None and j != i:
                score = score.masked_fill(padding[:, j : j + 1], float("-inf"))
            scores.append(score)
        attention = torch.stack(scores, -1).softmax(-1)  # (B, H, keys)
        if masks.attention is not None:
            attention = attention * masks.attention[:, :, i - before, first : i + 1]
        attended.append(torch.einsum("bhj,bjhd->bhd", attention, value[:, first : i + 1]).flatten(1))

    z = z[:, before:]
    a = _drop(torch.stack(attended, 1) @ weights.out.T + weights.out_bias, masks.hidden)
    h = a + z + u_h[:, before:] if u_h.shape[-1] else a + z
    inner = _normed(h, weights.middle_norm)
    if weights.attention_norm is None or weights.closing_norm is None:
        h = inner
    inner = _activated(inner @ weights.ffn_in.T + weights.ffn_in_bias, weights.activation)
    inner = _drop(inner, masks.ffn_inner)
    outer = _drop(inner @ weights.ffn_out.T + weights.ffn_out_bias, masks.ffn_outer)
    return _normed(h + outer, weights.closing_norm)


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, T, K) times a mask (B, K) that all positions share."""
    return x if mask is None else x * mask.unsqueeze(1)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x (B, T, C) normalised; x where there is no norm."""
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    x = x if norm.gain is None else x * norm.gain
    return x if norm.bias is None else x + norm.bias


def _activated(x: Tensor, activation: Activation) -> Tensor:
    """act(x), or act(a) * b with x = [a, b]."""
    a, b = x.chunk(2, -1) if activation.gated else (x, torch.ones_like(x))
    share = {
        "relu": lambda: (a > 0).to(a),
        "gelu": lambda: torch.distributions.Normal(0.0, 1.0).cdf(a),
        "silu": lambda: 1 / (1 + torch.exp(-a)),
    }[activation.name]()
    return a * share * b


def _turned(x: Tensor) -> Tensor:
    """x (B, S, H, D): channels j and j + D/2, as one complex number, times exp(1i*s / 10000^(2*j/D)) at s."""
    half = x.shape[-1] // 2
    speed = 10000 ** (-torch.arange(half) * 2.0 / x.shape[-1]).to(x)
    turn = torch.polar(torch.ones(()).to(x), torch.arange(x.shape[1]).to(x)[:, None, None] * speed)
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([y.real, y.imag], -1)
