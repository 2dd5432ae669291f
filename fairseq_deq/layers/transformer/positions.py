"""How attention knows how far away a key is: relative positions, or rotary ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = ("relative", "rotary")


@dataclass(frozen=True)
class RelativeWeights:
    """What the scores by distance, (q_i + r_r) . (W_r R_{i-j}), are made of.

    Attributes:
        matrix: W_r, (H*D, C).
        content_bias, position_bias: r_w and r_r, (H, D).
    """

    matrix: Tensor
    content_bias: Tensor
    position_bias: Tensor


def sinusoid(distance: Tensor, dim: int) -> Tensor:
    """R: [sin; cos] of distance over wavelengths 2*pi to 10000*2*pi, (len(distance), dim)."""
    inverse = 10000 ** (-torch.arange(0, dim, 2, device=distance.device, dtype=torch.float32) / dim)
    angle = distance.float().unsqueeze(1) * inverse
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :dim]


@dataclass(frozen=True)
class Rotation:
    """x -> G_i x at position i: channels j and j + D/2 of each head turn by i / 10000^(2*j/D).

    (G_i q) . (G_j k) depends on i - j alone, so that positions may be counted from anywhere.

    Attributes:
        cos, sin: of the angles, twice over, (n, 1, D); those of n positions, or (1, 1, D) of one.
    Source: Su et al. (2021, arXiv 2104.09864).
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, first: int, count: int, head_dim: int, like: Tensor) -> Rotation:
        """That of the positions from `first` on, in the device and dtype of `like`."""
        # In float64: far into a text an angle has no digits to lose.
        device, dtype = like.device, torch.float64
        inverse = 10000 ** (-torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
        position = torch.arange(first, first + count, device=device, dtype=dtype)
        angle = position.unsqueeze(1) * inverse
        angle = torch.cat([angle, angle], 1).unsqueeze(1)
        return cls(angle.cos().to(like.dtype), angle.sin().to(like.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x turned, (..., n, H*D)."""
        heads = x.unflatten(-1, (-1, self.cos.shape[-1]))
        a, b = heads.chunk(2, -1)
        return (heads * self.cos + torch.cat([-b, a], -1) * self.sin).flatten(-2)

    def back(self, x: Tensor) -> Tensor:
        """x turned back, (..., n, H*D): G_i^T x."""
        return Rotation(self.cos, -self.sin)(x)

    def rows(self, index: Tensor) -> Rotation:
        """Those of the positions `index`, (n',), among these."""
        return Rotation(self.cos.index_select(0, index), self.sin.index_select(0, index))

    def repeated(self, batch: int) -> Rotation:
        """Those of the positions of several samples, one sample after another."""
        return Rotation(self.cos.repeat(batch, 1, 1), self.sin.repeat(batch, 1, 1))


def turned(x: Tensor, rotation: Rotation | None) -> Tensor:
    """x (..., n, H*D), turned where there is a rotation."""
    return x if rotation is None else rotation(x)
