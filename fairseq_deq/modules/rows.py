"""Matrix products whose rows round the same in any company."""

from __future__ import annotations

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
