"""Matrix products that round a row the same, whatever other rows stand beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A product with rows in multiples of this rounds a row the same, however many there are.
ROW_MULTIPLE = 16


def padded_count(n: int) -> int:
    """The next multiple of `ROW_MULTIPLE`, n itself included."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(rows: Tensor) -> Tensor:
    """Add zero rows up to a multiple of 16, so that a matrix product rounds a row the same in any matrix.

    Args:
        rows: (n, K).
    Returns:
        (n', K), n' the next multiple.
    """
    missing = padded_count(rows.shape[0]) - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def rowwise_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (n, K) @ weight (M, K)^T + bias, each row rounded the same, whatever stands beside it.

    Args:
        rows: (n, K).
        weight: (M, K).
        bias: (M,) or None.
    Returns:
        (n, M).
    """
    n = rows.shape[0]
    out = F.linear(pad_rows(rows), weight, bias)
    return out if out.shape[0] == n else out[:n]


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights (..., Q, S) @ values (..., S, D), D filled up to a multiple of 4: cf. `pad_rows`."""
    missing = -values.shape[-1] % 4
    if not missing:
        return torch.matmul(weights, values)
    return torch.matmul(weights, F.pad(values, (0, missing)))[..., :-missing]


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, H, Q, K) @ weight (H, K, M): one product for each head, the weight not copied."""
    samples, heads, queries = x.shape[:3]
    product = torch.bmm(x.transpose(0, 1).reshape(heads, samples * queries, -1), weight)
    return product.view(heads, samples, queries, -1).transpose(0, 1)
