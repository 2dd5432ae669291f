"""Dropout masks with a row per sample, applied to matrices with a row per position."""

from __future__ import annotations

from torch import Tensor


class SampleRows:
    """The sample that each row of a matrix belongs to, where rows are positions.

    Args:
        batch, length: B and T, if the rows are all positions in order, n = B*T.
        sample: the sample of each row, (n,), if they are not; None: they are.
    """

    def __init__(self, batch: int, length: int, sample: Tensor | None = None) -> None:
        self.batch, self.length, self.sample = batch, length, sample

    def masked(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """rows (n, K), each times its sample's row of mask (B, K)."""
        if mask is None:
            return rows
        if self.sample is not None:
            return rows * mask.index_select(0, self.sample)
        return (rows.view(self.batch, self.length, -1) * mask.unsqueeze(1)).view_as(rows)

    def spread(self, mask: Tensor | None) -> Tensor | None:
        """mask (B, K), repeated so that each row of the matrix has one, (n, K)."""
        if mask is None:
            return None
        if self.sample is not None:
            return mask.index_select(0, self.sample)
        return mask.unsqueeze(1).expand(-1, self.length, -1).flatten(0, 1)
