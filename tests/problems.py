"""Maps with known fixed points, (B, T, C) -> (B, T, C), and maps that have none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A map, where to start, and its fixed point."""

    name: str
    f: Callable[[Tensor], Tensor]
    z0: Tensor
    solution: Tensor


def _affine(name: str, matrix: Tensor, dtype: torch.dtype) -> Problem:
    matrix = matrix.to(dtype)
    width = matrix.shape[0]
    b = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    solution = torch.linalg.solve(torch.eye(width, dtype=dtype) - matrix, b.unsqueeze(-1)).squeeze(-1)
    return Problem(name, lambda z: z @ matrix.T + b, torch.zeros_like(b), solution)


def solvable(dtype: torch.dtype) -> list[Problem]:
    """Problems that every accelerated solver must solve; plain iteration contracts on each of them."""
    angle = math.pi / 2
    rotation = 0.9 * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    contraction = torch.diag(torch.tensor([0.5, -0.3, 0.1, 0.8]))
    non_normal = torch.tensor([[0.5, 4.0, 0.0], [0.0, 0.5, 4.0], [0.0, 0.0, 0.5]])
    flat = torch.tensor([[0.0, 0.0], [0.0, 0.999]])
    start = torch.linspace(-1, 1, 12, dtype=dtype).view(2, 3, 2)
    cosine = Problem("cosine", torch.cos, start, torch.full_like(start, 0.7390851332151607))
    return [
        _affine("contraction", contraction, dtype),
        _affine("rotation", rotation, dtype),
        _affine("non-normal", non_normal, dtype),
        _affine("flat", flat, dtype),
        cosine,
    ]


def expanding(dtype: torch.dtype) -> Problem:
    """Plain iteration diverges (slopes -1.5 and 3); Anderson and Broyden find the fixed point."""
    return _affine("expanding", torch.diag(torch.tensor([-1.5, 3.0])), dtype)


class CausalMap:
    """z_t = tanh(A z_t + sum_{s<t} L z_s / t + b_t): position t depends on positions up to t.

    `A` has spectral radius above 1, so plain iteration does not settle; `restrict` counts what it computes.
    """

    def __init__(self, b: Tensor, gain: float = 1.4) -> None:
        width = b.shape[-1]
        generator = torch.Generator().manual_seed(1)
        own = torch.randn(width, width, generator=generator).to(b.dtype)
        self.own = gain * own / torch.linalg.matrix_norm(own, 2)
        self.before = 2.0 * torch.randn(width, width, generator=generator).to(b.dtype) / width**0.5
        self.b = b
        self.rows = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.rows += z.shape[0] * z.shape[1]
        return torch.tanh(_rowwise(z, self.own) + self._past(z) + self.b)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        shape = z.shape

        def f(rows: Tensor) -> Tensor:
            self.rows += rows.shape[0]
            whole = z.reshape(-1, shape[-1]).index_copy(0, positions, rows).view(shape)
            out = torch.tanh(_rowwise(whole, self.own) + self._past(whole) + self.b)
            return out.view(-1, shape[-1]).index_select(0, positions)

        return f

    def _past(self, z: Tensor) -> Tensor:
        count = torch.arange(z.shape[1], dtype=z.dtype).clamp(min=1).view(1, -1, 1)
        return _rowwise((z.cumsum(1) - z) / count, self.before)


def _rowwise(z: Tensor, matrix: Tensor) -> Tensor:
    """z @ matrix.T, rounded for each row alone."""
    return (z.unsqueeze(-2) * matrix).sum(-1)


class Relay:
    """Three positions: the second rests at zero until the first has moved, the third moves if `third` is 1.

    f_0 = 1, f_1 = z_0 * tanh(A z_1 + d), f_2 = third * tanh(A z_2 + d), with A of spectral radius above 1.
    From zero the first settles at once, all rest, and the second is woken later, alone or beside the third.
    """

    def __init__(self, third: Tensor) -> None:
        width, generator = 5, torch.Generator().manual_seed(3)
        own = torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.own = (1.5 * own / torch.linalg.matrix_norm(own, 2)).to(third.dtype)
        self.shift = torch.randn(width, generator=generator, dtype=torch.float64).to(third.dtype)
        self.third = third.view(-1, 1)
        self.z0 = third.new_zeros(third.shape[0], 3, width)

    def __call__(self, z: Tensor) -> Tensor:
        own = torch.tanh(_rowwise(z, self.own) + self.shift)
        return torch.stack([torch.ones_like(z[:, 0]), z[:, 0] * own[:, 1], self.third * own[:, 2]], 1)
