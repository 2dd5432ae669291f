"""Matrix products of the layers, whose rows round the same in any company."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..solvers.invariant_matmul import pad_rows, rowwise_linear

__all__ = ["SampleRows", "headwise", "pad_rows", "rowwise_linear", "weighted"]


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
