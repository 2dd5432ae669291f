"""Variational dropout: one mask per sample, drawn before a solve and used in all of its evaluations."""

from __future__ import annotations

import torch
from torch import Tensor


def variational_mask(like: Tensor, shape: tuple[int, ...], p: float, training: bool) -> Tensor | None:
    """A mask of zeros and 1/(1-p), or None where nothing is to be dropped.

    Args:
        like: a tensor of the device and dtype to use.
        shape: of the mask; (B, 1, C) for one mask per sample that all positions share.
        p: probability of a zero.
        training: False: nothing is dropped.
    Returns:
        the mask, or None.
    Source: Gal and Ghahramani (2016, arXiv 1512.05287).
    """
    if not training or p == 0.0:
        return None
    return torch.empty(shape, device=like.device, dtype=like.dtype).bernoulli_(1 - p).div_(1 - p)


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """x * mask, or x where there is no mask."""
    return x if mask is None else x * mask
