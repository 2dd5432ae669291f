"""What an evaluation of f tells of every lane: the small rules that the loop applies to its books."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .fused import fused
from .record import Array, LaneRecord, namespace


@dataclass(frozen=True)
class Measured:
    """|f(z) - z|, inf where not finite, |f(z)|, and whether the former is small enough; (n,) each."""

    distance: Array
    size: Array
    passed: Array

    @classmethod
    def of(cls, g_square: Array, f_square: Array, limit: float, rtol: float) -> Measured:
        """From |f(z) - z|^2 and |f(z)|^2; passed: the root of the former is at most limit + rtol*|f(z)|."""
        return cls(*_measure(g_square, f_square, limit, rtol))


@fused
def _measure(g_square: Array, f_square: Array, limit: float, rtol: float) -> tuple[Array, Array, Array]:
    """The entries of `Measured`."""
    xp = namespace(g_square)
    distance, size = xp.sqrt(g_square), xp.sqrt(f_square)
    finite = distance < float("inf")  # nor NaN
    passed = (distance <= limit + rtol * size) & finite
    return xp.where(finite, distance, float("inf")), size, passed


@fused
def send_back(moving: Array, record: LaneRecord, patience: int, tau: float) -> Array:
    """The lanes that must restart, after they were told to."""
    lost = record.must_restart(patience)
    record.restart(lost, tau)
    return lost


def finite_rows(rows: Tensor, on_host: bool) -> Array:
    """Which rows (n, D) are finite, (n,)."""
    finite = torch.isfinite(torch.linalg.vector_norm(rows, dim=1))
    return finite.numpy() if on_host else finite


def up_to_the_first_false(flags: Array, direction: int) -> Array:
    """(B, T) bool: true as long as nothing before (direction 1) or after (-1) in the row is false."""
    if isinstance(flags, Tensor):
        flags = flags if direction > 0 else flags.flip(1)
        flags = flags.to(torch.int32).cumprod(1).bool()
        return flags if direction > 0 else flags.flip(1)
    return np.logical_and.accumulate(flags[:, ::direction], 1)[:, ::direction]
