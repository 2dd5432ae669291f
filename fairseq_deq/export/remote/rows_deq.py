"""Matrix products with a row per position, which round a row the same, whatever the other rows are.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rowwise_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (n, K) @ weight (M, K)^T + bias, with n padded to a multiple of 16, so rows round the same."""
    n = rows.shape[0]
    missing = -n % 16
    return F.linear(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight, bias)[:n]


class Preconditioner:
    """P = I + left right^T, an approximate inverse of I minus the mean Jacobian of f, which all rows share.

    Args:
        left, right: (C, r).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    def __call__(self, rows: Tensor) -> Tensor:
        """P applied to each row of rows (n, C)."""
        inside = rowwise_linear(rows, self.right.T.to(rows.dtype))
        return rows + rowwise_linear(inside, self.left.to(rows.dtype))
