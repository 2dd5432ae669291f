"""The two ways in which attention scores depend on the distance of a key: relative and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = ("relative", "rotary")


@dataclass(frozen=True)
class RelativeWeights:
    """The weights of relative positions, A_ij = ((q_i + r_w) . k_j + (q_i + r_r) . (W_r R_{i-j})) / sqrt(D).

    Attributes:
        matrix: W_r, (H*D, C).
        content_bias, position_bias: r_w and r_r, (H, D).
    Source: Dai et al. (2019, arXiv 1901.02860).
    """

    matrix: Tensor
    content_bias: Tensor
    position_bias: Tensor


def sinusoid(distance: Tensor, dim: int) -> Tensor:
    """R: [sin; cos] of distance / 10000^(2*j/dim), j = 0 ... dim/2 - 1, (len(distance), dim), in float32."""
    inverse = 10000 ** (-torch.arange(0, dim, 2, device=distance.device, dtype=torch.float32) / dim)
    angle = distance.float().unsqueeze(1) * inverse
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :dim]


@dataclass(frozen=True)
class Rotation:
    """x -> G_i x at position i: channels j and j + D/2 of each head turn by the angle i / 10000^(2*j/D).

    (G_i q) . (G_s k) depends on positions i and s only through i - s, so positions may be counted from any
    start.

    Attributes:
        cos, sin: of the D/2 angles, written twice, (n, 1, D) for n positions, or (1, 1, D) for one.
    Source: Su et al. (2021, arXiv 2104.09864).
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, first: int, count: int, head_dim: int, like: Tensor) -> Rotation:
        """The rotation at positions first, ..., first + count - 1.

        Args:
            first: the first position.
            count: number of positions, n.
            head_dim: channels of a head, D.
            like: a tensor of the device and dtype to use.
        """
        # In float64: the angle of a position far into a text would lose digits in float32.
        device, dtype = like.device, torch.float64
        inverse = 10000 ** (-torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
        position = torch.arange(first, first + count, device=device, dtype=dtype)
        angle = position.unsqueeze(1) * inverse
        angle = torch.cat([angle, angle], 1).unsqueeze(1)
        return cls(angle.cos().to(like.dtype), angle.sin().to(like.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """G_i x of x (..., n, H*D), one position per row."""
        heads = x.unflatten(-1, (-1, self.cos.shape[-1]))
        a, b = heads.chunk(2, -1)
        return (heads * self.cos + torch.cat([-b, a], -1) * self.sin).flatten(-2)

    def back(self, x: Tensor) -> Tensor:
        """G_i^T x of x (..., n, H*D), which undoes the rotation."""
        return Rotation(self.cos, -self.sin)(x)

    def rows(self, index: Tensor) -> Rotation:
        """The rotation at the positions with these indices, (n',), among its own."""
        return Rotation(self.cos.index_select(0, index), self.sin.index_select(0, index))

    def repeated(self, batch: int) -> Rotation:
        """The rotation of `batch` samples that have the same positions, one sample after another."""
        return Rotation(self.cos.repeat(batch, 1, 1), self.sin.repeat(batch, 1, 1))


def turned(x: Tensor, rotation: Rotation | None) -> Tensor:
    """rotation(x), or x where there is no rotation; x is (..., n, H*D)."""
    return x if rotation is None else rotation(x)
