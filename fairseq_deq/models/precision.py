"""The tolerance of a solve: looser early in training if asked for, never below rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..solvers import SolverConfig


def dtype_of_f(like: Tensor) -> torch.dtype:
    """The type that matrix products of `like` are computed in: its own, or that of autocast."""
    device = like.device.type
    if torch.is_autocast_enabled(device) and like.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return like.dtype


def clamp_tolerance(config: SolverConfig, like: Tensor) -> SolverConfig:
    """The same solve, with a tolerance that rounding lets it reach.

    Evaluating f in a precision of eps changes f(z) by about eps*|f(z)|, so that no residual below it means
    anything: rtol <- max(rtol, eps), or atol where there is no rtol (the states of these models have a root
    mean square of about 1). eps is 2^-7 in bfloat16, 2^-10 in float16, 2^-23 in float32.

    Args:
        config: options of the solve.
        like: a tensor that f is computed from.
    Returns:
        `config` itself where the tolerance is within reach.
    """
    eps = torch.finfo(dtype_of_f(like)).eps
    if config.rtol > 0 and config.rtol < eps:
        return replace(config, rtol=eps)
    if config.rtol == 0 and config.atol < eps:
        return replace(config, atol=eps)
    return config


@dataclass(frozen=True)
class EarlyTolerance:
    """A looser relative tolerance in the first updates of a training.

    Attributes:
        eps: the tolerance.
        updates: how many updates it holds for; 0: none.
    """

    eps: float
    updates: int

    def at(self, config: SolverConfig, update: int) -> SolverConfig:
        """The options of a solve in the update after `update` finished ones."""
        return replace(config, rtol=max(config.rtol, self.eps)) if update < self.updates else config
