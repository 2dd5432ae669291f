"""Damped fixed-point iteration: z <- z + tau*P (f(z) - z)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SolverConfig
from .record import Array
from .registry import Precondition, register_solver
from .rows import to_rows


@register_solver("picard")
class Picard:
    """z_{k+1} = z_k + tau*P (f(z_k) - z_k); converges where I - tau*P (I - J) has spectral radius below 1.

    It has no history, so its estimate of (I - J)^{-1} is P, or I without a preconditioner.
    Picard (1890).
    """

    default_memory = 1
    alike = True

    def __init__(self, config: SolverConfig, like: Tensor, books: Array) -> None:
        pass

    def observe(
        self, z: Tensor, g: Tensor, restarted: Array | None, precondition: Precondition
    ) -> list[Tensor]:
        return []

    def step(
        self, products: Array, z: Tensor, g: Tensor, tau: Array | None, precondition: Precondition
    ) -> Tensor:
        move = precondition(g)
        return z + move if tau is None else torch.addcmul(z, move, to_rows(tau, z))

    def skip(self) -> None:
        pass

    def subset(self, source: Array) -> Picard:
        return self

    def inverse_transpose(self, vector: Tensor, precondition: Precondition) -> Tensor:
        return precondition(vector)
