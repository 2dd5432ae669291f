"""Rows of tensors, chosen and weighted by the books of a solve (one entry per lane, see `record.py`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .record import Array


def to_index(index: Array, like: Tensor) -> Tensor:
    """Indices or a mask from the books, as a tensor on the device of `like`."""
    return index if isinstance(index, Tensor) else torch.from_numpy(np.ascontiguousarray(index))


def to_rows(values: Array, like: Tensor) -> Tensor:
    """Numbers of the books, (..., n), as factors of rows, (..., n, 1), in the type of `like`."""
    if isinstance(values, Tensor):
        return values.to(like.dtype).unsqueeze(-1)
    if like.dtype == torch.float32:  # which NumPy makes in a third of the time
        values = values.astype(np.float32)
    return torch.from_numpy(values[..., None]).to(like.dtype)


def select_rows(history: Tensor, source: Array) -> Tensor:
    """Rows `source` of `history` along dimension 0, with zeros where `source` is -1."""
    index = to_index(source, history)
    kept = history.index_select(0, index.clamp(min=0))
    return kept.masked_fill_((index < 0).view(-1, *[1] * (history.dim() - 1)), 0)


def forget_rows(history: Tensor, lanes: Array) -> None:
    """Set the rows `lanes` (n,) bool, of a solve on the CPU, to zero, in place."""
    history.index_fill_(0, torch.from_numpy(np.flatnonzero(lanes)), 0.0)


def choose_rows(mask: Array, a: Tensor, b: Tensor) -> Tensor:
    """Rows of `a` (n, D) where the mask (n,) is true, of `b` elsewhere; `a`, overwritten, or a new tensor."""
    if isinstance(mask, Tensor):
        return torch.where(mask.unsqueeze(1), a, b)
    others = np.flatnonzero(~mask)  # on the CPU several times faster than a broadcast where
    if not others.size:
        return a
    index = torch.from_numpy(others)
    return a.index_copy_(0, index, b.index_select(0, index))
