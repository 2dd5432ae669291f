"""The rules that judge every lane after an evaluation of f, applied to the record of the lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fused import columns, fused
from .record import Array, LaneRecord, RestartManner, namespace


@dataclass(frozen=True)
class Measured:
    """|f(z) - z|, inf where not finite, |f(z)|, and whether the former is small enough; (n,) each."""

    distance: Array
    size: Array
    passed: Array

    @classmethod
    def of(cls, squares: Array, limit: Any, rtol: Any) -> Measured:
        """From |f(z) - z|^2 and |f(z)|^2, (2, n); passed: |f(z) - z| is at most limit + rtol*|f(z)|."""
        return cls(*_measure(squares, limit, rtol))

    def keeping(self, final: Array, record: LaneRecord) -> Measured:
        """The same, but `final` lanes (n,), which need not have been evaluated, keep the record's entries."""
        xp = namespace(self.distance)
        return Measured(
            xp.where(final, record.best_distance, self.distance),
            xp.where(final, record.best_size, self.size),
            xp.where(final, ~record.abandoned, self.passed),
        )


@fused
def _measure(squares: Array, limit: Any, rtol: Any) -> tuple[Array, Array, Array]:
    """The entries of `Measured`."""
    xp = namespace(squares)
    distance, size = xp.sqrt(squares)
    finite = distance < float("inf")  # nor NaN
    passed = (distance <= limit + rtol * size) & finite
    return xp.where(finite, distance, float("inf")), size, passed


@fused
def send_back(moving: Array, record: LaneRecord, patience: int, manner: RestartManner) -> Array:
    """Restart the lanes that must, and return which ones."""
    lost, far = record.must_restart(patience)
    record.restart(lost, far, manner)
    return lost


@fused
def verdict(
    books: Tensor,
    products: list[Tensor],
    g: Tensor,
    fz: Tensor,
    limit: Any,
    rtol: Any,
    record: LaneRecord,
    patience: int,
    manner: RestartManner,
) -> tuple[Tensor, tuple[Array, Array, Array], Array, Array]:
    """Judge the lanes after an evaluation of f, as one rule that can be compiled.

    Args:
        books: any entry of `record`, to show what kind of arrays to use; `record` is updated.
        products: the inner products of the method.
        g, fz: f(z) - z and f(z), (n, D).
        limit, rtol, patience, manner: as for `Measured.of`, `must_restart` and `restart`.
    Returns:
        the products as arrays of that kind, the entries of `Measured`, the lanes whose state is their best so
        far, and those that must restart.
    """
    entries = columns(books, products, g, fz)
    measured = _measure(entries[-2:], limit, rtol)
    better = record.judge(*measured)
    return entries[:-2], measured, better, send_back(record.moving, record, patience, manner)


def finite_rows(rows: Tensor, on_host: bool) -> Array:
    """Which rows (n, D) are finite, (n,)."""
    finite = torch.linalg.vector_norm(rows, dim=1) < torch.inf  # nor NaN
    return finite.numpy() if on_host else finite


def up_to_the_first_false(flags: Array, direction: int) -> Array:
    """(B, T) bool: true as long as nothing before (direction 1) or after (-1) in the row is false."""
    if isinstance(flags, Tensor):
        flags = flags if direction > 0 else flags.flip(1)
        flags = flags.cummin(1).values
        return flags if direction > 0 else flags.flip(1)
    return np.logical_and.accumulate(flags[:, ::direction], 1)[:, ::direction]
