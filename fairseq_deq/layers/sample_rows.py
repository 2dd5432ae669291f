"""Dropout masks of samples, spread over rows that are positions."""

from __future__ import annotations

from torch import Tensor


class SampleRows:
    """Which sample each row of a matrix of positions belongs to.

    Args:
        batch, length: samples and rows of each, where the rows are all positions in order.
        sample: the sample of each row, (n,), where they are not.
    """

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
