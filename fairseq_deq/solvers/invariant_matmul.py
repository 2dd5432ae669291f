"""Matrix products whose rows round the same in any company."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# A product with rows in multiples of this rounds a row the same, however many there are.
ROW_MULTIPLE = 16


def padded_count(n: int) -> int:
    """The next multiple of `ROW_MULTIPLE`, n itself included."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple of 16: a matrix product then rounds a row the same in any company.

    Args:
        rows: (n, K).
    Returns:
        (n', K), n' the next multiple.
    """
    missing = padded_count(rows.shape[0]) - rows.shape[0]
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
