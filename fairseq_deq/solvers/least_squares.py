"""Anderson's least squares, gamma = argmin |g - DG*gamma|: one small system per lane, all lanes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import SolverConfig
from .record import Array, namespace

# The ridge of a difference grows to this at most: the squared length of its column once that is scaled.
_MOST_RIDGE = 1.0
# Where a column of length one has no more than this beside the others, squared, they span it.
NO_PIVOT = 1e-14


def ridge_table(config: SolverConfig, slot: Array) -> Array:
    """(S, S): row i has the ridge of each slot while slot i holds the newest difference.

    Args:
        config: the options.
        slot: 0, 1, ..., S - 1, in float64.
    """
    age = (slot[:, None] - slot) % len(slot)
    ridge, limit = config.ridge * config.ridge_growth**age, max(config.ridge, _MOST_RIDGE)
    return namespace(slot).where(ridge < limit, ridge, limit)


def least_squares(gram: Array, rhs: Array, ridges: Array, has_ridge: bool, slots: Sequence[int]) -> Array:
    """gamma, by Gauss-Jordan elimination, its columns scaled to length one; 0 where that fails. With NumPy.

    Args:
        gram, rhs: DG^T DG and DG^T g, (S, S, n) and (S, n).
        ridges: (S,), relative to the squared lengths of the columns.
        has_ridge: whether they are above `NO_PIVOT`; if not, a column that the others span has no weight.
        slots: the columns in use; the others are zero.
    Returns:
        (S, n).
    """
    if has_ridge and rhs.shape[1] == 1:
        return _of_one_lane(gram[..., 0].tolist(), rhs[:, 0].tolist(), ridges.tolist())
    square = gram.diagonal().T  # (S, n)
    known = square > 0
    inverse = known / np.sqrt(np.where(known, square, 1.0))  # 1 / lengths of the columns of DG
    normal = gram * inverse * inverse[:, None]
    diagonal = list(range(len(rhs)))
    normal[diagonal, diagonal] = 1 + ridges[:, None]
    system = np.concatenate([normal, (rhs * inverse)[:, None]], 1)  # (S, S + 1, n)
    # No rows are exchanged, since the matrix is positive definite.
    for i in slots:
        pivot = system[i, i]
        if not has_ridge:
            pivot = np.where(pivot > NO_PIVOT, pivot, np.inf)
        row = system[i] / pivot
        system = system - system[:, i, None] * row
        system[i] = row
    gamma = system[:, -1] * inverse
    return np.where(np.isfinite(gamma.sum(0)), gamma, 0.0)


def stacked_least_squares(gram: Tensor, rhs: Tensor, ridges: Tensor, has_ridge: bool) -> Tensor:
    """The same for tensors on a device, in few launches; all columns count as used."""
    square = gram.diagonal().T  # (S, n)
    inverse = square.masked_fill(square <= 0, math.inf).rsqrt()  # 1 / lengths of the columns of DG
    system = torch.cat([gram, rhs.unsqueeze(1)], 1) * inverse.unsqueeze(1)  # (S, S + 1, n)
    system[:, :-1] *= inverse
    system.diagonal().copy_(1 + ridges)
    for i in range(len(rhs)):
        pivot = system[i, i]
        if not has_ridge:
            pivot = pivot.masked_fill(~(pivot > NO_PIVOT), math.inf)
        row = system[i] / pivot
        system = torch.addcmul(system, system[:, i, None], row, value=-1)
        system[i] = row
    gamma = system[:, -1] * inverse
    total = gamma.sum(0)
    return gamma.masked_fill(total - total != 0, 0)  # not finite


def compiled_least_squares(gram: Tensor, rhs: Tensor, ridges: Tensor) -> Tensor:
    """The same for a compiler, which makes one kernel of it: an operation on (n,) for each entry."""

    def inverse_root(square: Tensor) -> Tensor:
        known = square > 0
        return torch.where(known, torch.where(known, square, 1.0) ** -0.5, 0.0)

    gamma = torch.stack(_entry_by_entry(gram, rhs, ridges, inverse_root))
    return torch.where(torch.isfinite(gamma.sum(0)), gamma, 0.0)


def _of_one_lane(gram: list[list[float]], rhs: list[float], ridges: list[float]) -> Array:
    """The same numbers, (S, 1), in a third of the time: generation solves for one position after another."""

    def inverse_root(square: float) -> float:
        return 1 / math.sqrt(square) if square > 0 else 0.0

    try:
        gamma = _entry_by_entry(gram, rhs, ridges, inverse_root)
    except ZeroDivisionError:
        gamma = [math.nan]
    return np.array(gamma if math.isfinite(sum(gamma)) else [0.0 for _ in rhs])[:, None]


def _entry_by_entry(gram: Any, rhs: Any, ridges: Any, inverse_root: Callable[[Any], Any]) -> list[Any]:
    """gamma from entries that are numbers, or tensors (n,)."""
    slots = range(len(rhs))
    scale = [inverse_root(gram[i][i]) for i in slots]
    left = [[1 + ridges[i] if i == j else gram[i][j] * scale[j] * scale[i] for j in slots] for i in slots]
    right = [rhs[i] * scale[i] for i in slots]
    for p in slots:
        pivot = left[p][p]
        row, own = [left[p][j] / pivot for j in slots], right[p] / pivot
        for i in slots:
            if i != p:
                factor = left[i][p]
                left[i] = [left[i][j] - factor * row[j] if j > p else left[i][j] for j in slots]
                right[i] = right[i] - factor * own
        left[p], right[p] = row, own
    return [right[i] * scale[i] for i in slots]
