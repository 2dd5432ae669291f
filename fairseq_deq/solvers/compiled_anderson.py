"""Anderson's method with identical iterations, for a compiler or a CUDA graph; unused slots are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from .fused import fused
from .least_squares import compiled_least_squares, least_squares


@fused
def new_difference(
    forget: Tensor, z: Tensor, g: Tensor, last_z: Any, last_g: Any, dz: list[Tensor], dg: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The newest differences of z and g, and the inner products that they bring.

    Args:
        forget: (n,) bool, lanes at which all differences become zero, the older ones in place.
        z, g, last_z, last_g: the states and f(z) - z of this and of the last iteration, (n, D).
        dz, dg: the older differences.
    Returns:
        DZ_new, DG_new, and <DG_j, DG_new> of the older ones, then of the new one, then <DG_new, g>.
    """
    lanes = forget.unsqueeze(1)
    for history in (*dz, *dg):
        history.masked_fill_(lanes, 0)
    new = (g - last_g).masked_fill(lanes, 0)
    return (z - last_z).masked_fill(lanes, 0), new, [vecdot(d, new) for d in (*dg, new, g)]


@fused
def mixed(
    gram: Tensor,
    rhs: Tensor,
    forget: Tensor,
    products: Tensor,
    newest: Tensor,
    ridges: Tensor,
    has_ridge: bool,
    z: Tensor,
    g: Tensor,
    dz: list[Any],
    dg: list[Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anderson's least squares: gamma = argmin |g - DG*gamma|.

    Args:
        gram, rhs: (slots, slots, n) and (slots, n), the oldest difference first.
        forget: (n,) bool, lanes without a history.
        products: <DG_j, DG_new> for all j, and <DG_new, g>, (slots + 1, n).
        newest: (slots,) bool, the slot of the new difference, which is the last.
        ridges, has_ridge: as for `least_squares`.
        z, g, dz, dg: the states, f(z) - z, and the differences of both.
    Returns:
        the Gram matrix and DG^T g, brought up to date, g - DG*gamma and z - DZ*gamma.
    """
    row, last = products[:-1], products[-1]
    gram, rhs = torch.where(forget, 0.0, gram), torch.where(forget, 0.0, rhs)
    gram, rhs = gram.roll((-1, -1), (0, 1)), rhs.roll(-1, 0)  # the oldest goes
    gram = torch.where(newest[:, None, None], row, torch.where(newest[:, None], row[:, None], gram))
    rhs = torch.where(newest[:, None], last, rhs + row)
    if torch.compiler.is_compiling():
        gamma = compiled_least_squares(gram, rhs, ridges)
    else:
        gamma = least_squares(gram, rhs, ridges, has_ridge, range(len(rhs)))
    left, following = g, z
    for i in range(len(dz)):
        weight = gamma[i].to(z.dtype).unsqueeze(-1)
        left, following = left - dg[i] * weight, following - dz[i] * weight
    return gram, rhs, left, following
