"""Matrix products whose rows round the same in any company."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..solvers.loop import ROW_MULTIPLE


def pad_rows(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple of 16: a matrix product then rounds a row the same in any company.

    Args:
        rows: (n, K).
    Returns:
        (n', K), n' the next multiple.
    """
    missing = -rows.shape[0] % ROW_MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def rowwise_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (n, K) @ weight (M, K)^T + bias, each row rounded the same in any company.

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
    """x (B, H, Q, K) @ weight (H, K, M): one product a head, and no copy of the weight for each sample."""
    samples, heads, queries = x.shape[:3]
    product = torch.bmm(x.transpose(0, 1).reshape(heads, samples * queries, -1), weight)
    return product.view(heads, samples, queries, -1).transpose(0, 1)


class SampleRows:
    """Which sample each row of a matrix of positions belongs to, to spread one mask a sample over them."""

    def __init__(self, batch: int, length: int, sample: Tensor | None = None) -> None:
        self.batch, self.length, self.sample = batch, length, sample

    def masked(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """rows (n, K) times mask (B, K)."""
        if mask is None:
            return rows
        if self.sample is not None:
            return rows * mask.index_select(0, self.sample)
        return (rows.view(self.batch, self.length, -1) * mask.unsqueeze(1)).view_as(rows)

    def spread(self, mask: Tensor | None) -> Tensor | None:
        """mask (B, K), a row for each row of the matrix, (n, K)."""
        if mask is None:
            return None
        if self.sample is not None:
            return mask.index_select(0, self.sample)
        return mask.unsqueeze(1).expand(-1, self.length, -1).flatten(0, 1)
