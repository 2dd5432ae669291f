"""Damped fixed-point iteration: z <- z + tau*(f(z) - z)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SolverConfig
from .registry import register_solver


@register_solver("picard")
class Picard:
    """z_{k+1} = z_k + tau*(f(z_k) - z_k); converges where (1-tau)*I + tau*J has spectral radius below 1.

    Picard (1890).
    """

    default_memory = 1

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        pass

    def step(self, z: Tensor, fz: Tensor, fresh: Tensor | None, tau: Tensor) -> Tensor:
        return torch.addcmul(z, fz - z, tau)

    def select(self, source: Tensor) -> None:
        pass
