"""Damped fixed-point iteration: z <- z + tau*(f(z) - z)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SolverConfig
from .registry import register_solver


@register_solver("picard")
class Picard:
    """z_{k+1} = z_k + tau*(f(z_k) - z_k); converges where (1-tau)*I + tau*J has spectral radius below 1.

    It has no history, so its estimate of (I - J)^{-1} is I.
    Picard (1890).
    """

    default_memory = 1

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        pass

    def step(self, z: Tensor, fz: Tensor, g: Tensor, fresh: Tensor | None, tau: Tensor | None) -> Tensor:
        return fz.clone() if tau is None else torch.addcmul(fz, g, tau - 1)

    def skip(self) -> None:
        pass

    def subset(self, source: Tensor) -> Picard:
        return self

    def inverse_transpose(self, vector: Tensor) -> Tensor:
        return vector
