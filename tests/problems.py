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
        own = torch.randn(width, width, generator=generator).to(b)
        self.own = gain * own / torch.linalg.matrix_norm(own, 2)
        self.before = 2.0 * torch.randn(width, width, generator=generator).to(b) / width**0.5
        self.b = b
        self.rows = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.rows += z.shape[0] * z.shape[1]
        return torch.tanh(rowwise(z, self.own) + self._past(z) + self.b)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        shape = z.shape

        def f(rows: Tensor) -> Tensor:
            self.rows += rows.shape[0]
            whole = z.reshape(-1, shape[-1]).index_copy(0, positions, rows).view(shape)
            out = torch.tanh(rowwise(whole, self.own) + self._past(whole) + self.b)
            return out.view(-1, shape[-1]).index_select(0, positions)

        return f

    def _past(self, z: Tensor) -> Tensor:
        count = torch.arange(z.shape[1], dtype=z.dtype, device=z.device).clamp(min=1).view(1, -1, 1)
        return rowwise((z.cumsum(1) - z) / count, self.before)


def rowwise(z: Tensor, matrix: Tensor) -> Tensor:
    """z @ matrix.T, rounded for each row alone."""
    return (z.unsqueeze(-2) * matrix).sum(-1)


class Neighbours:
    """z_t = act(A z_t + B z_{t-1} + u_t): position t depends on itself and on the one before.

    `evaluations` counts the calls of f, at all positions or at some.
    """

    def __init__(
        self, u: Tensor, own: Tensor, before: Tensor, act: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        self.u, self.own, self.before, self.act = u, own, before, act
        self.evaluations = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.evaluations += 1
        earlier = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
        return self.act(rowwise(z, self.own) + rowwise(earlier, self.before) + self.u)

    def blocks(self, z: Tensor) -> Tensor:
        """dz'_t/dz_t for every position, (B, T, C, C), by autograd."""
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            fz = self(leaf)
        columns = []
        for c in range(
            z.shape[-1]
        ):  # a changed position changes itself and the next: look at every other one
            found = torch.zeros_like(z)
            for parity in (0, 1):
                picked = torch.zeros_like(z)
                picked[:, parity::2, c] = 1.0
                (rows,) = torch.autograd.grad(fz, leaf, picked, retain_graph=True)
                found[:, parity::2] = rows[:, parity::2]
            columns.append(found)
        return torch.stack(columns, 2)


def expanding_neighbours(
    dtype: torch.dtype = torch.float64, width: int = 16, batch: int = 3, length: int = 24
) -> Neighbours:
    """`Neighbours` whose own blocks share 8 directions of slope -2 to -9, and are small otherwise.

    Plain iteration diverges, and Anderson with few states has a hard time; one inverse of the mean block
    does nearly everything.
    """
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(width, width)).Q
    slopes = torch.diag(torch.arange(-9.0, -1.0, dtype=torch.float64))
    own = basis[:, :8] @ slopes @ (basis[:, :8] + 0.1 * draw(width, 8)).T
    own = own + 0.15 * draw(width, width) / width**0.5
    before = 0.15 * draw(width, width) / width**0.5
    u = draw(batch, length, width)
    return Neighbours(u.to(dtype), own.to(dtype), before.to(dtype), lambda x: x + 0.1 * torch.sin(x))


def block_mean(f: Neighbours, z: Tensor) -> Tensor:
    """The mean of the blocks of all positions."""
    return f.blocks(z).flatten(0, 1).mean(0)


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
        own = torch.tanh(rowwise(z, self.own) + self.shift)
        return torch.stack([torch.ones_like(z[:, 0]), z[:, 0] * own[:, 1], self.third * own[:, 2]], 1)


# ---------------------------------------------------------------------- the bank


class Pointwise:
    """Row by row z -> map(z, b), with a row of parameters b for each position; it can be restricted."""

    def __init__(self, map: Callable[[Tensor, Tensor], Tensor], b: Tensor) -> None:
        self.map, self.b = map, b
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.map(z, self.b)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        own = self.b.reshape(-1, self.b.shape[-1]).index_select(0, positions)

        def f(rows: Tensor) -> Tensor:
            self.calls += 1
            return self.map(rows, own)

        return f


@dataclass(frozen=True)
class Case:
    """A map of the bank, and what is true of it.

    Attributes:
        make: the map, in some dtype.
        z0: the start, (2, 3, C), in float64.
        solution: its fixed point; None where it has none, or many.
        rate: factor by which plain iteration shrinks the residual in the end; None where it does not.
        stiffness: |(I - J)^{-1}|: how many times the residual an error can be.
        relative: residual to ask for, as a share of |f(z)|; otherwise it is absolute.
        solvable: it has a fixed point.
        spoilt: the sample that has none, where only one has none.
    """

    name: str
    make: Callable[[torch.dtype], Pointwise]
    z0: Tensor
    solution: Tensor | None = None
    rate: float | None = None
    stiffness: float = 1.0
    relative: bool = True
    solvable: bool = True
    spoilt: int | None = None


def _shift(width: int, low: float = -1.0) -> Tensor:
    """Parameters, (2, 3, width), exact in every precision."""
    return (torch.linspace(low, 1, 6 * width, dtype=torch.float64) * 16).round().div(16).view(2, 3, width)


def _affine_case(name: str, matrix: Tensor) -> Case:
    matrix = matrix.double()
    b = _shift(matrix.shape[0])
    inverse = torch.linalg.inv(torch.eye(matrix.shape[0]).double() - matrix)
    radius = torch.linalg.eigvals(matrix).abs().max().item()

    def make(dtype: torch.dtype) -> Pointwise:
        own = matrix.to(dtype)
        return Pointwise(lambda z, b: z @ own.T + b, b.to(dtype))

    return Case(
        name,
        make,
        torch.zeros_like(b),
        b @ inverse.T,
        rate=radius if radius < 1 else None,
        stiffness=torch.linalg.matrix_norm(inverse, 2).item(),
    )


def _plain_case(name: str, map: Callable[[Tensor, Tensor], Tensor], z0: Tensor, **options: object) -> Case:
    return Case(name, lambda dtype: Pointwise(map, torch.zeros(2, 3, 1, dtype=dtype)), z0, **options)


def _rotation(degrees: float, size: float) -> Tensor:
    a = math.radians(degrees)
    return size * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def _poisoned(z: Tensor, b: Tensor) -> Tensor:
    """0.5 z + 1, and NaN where the parameter is."""
    return 0.5 * z + 1 + b


def _poisoned_case() -> Case:
    b = torch.zeros(2, 3, 2, dtype=torch.float64)
    b[0] = math.nan
    solution = torch.full_like(b, 2.0)
    return Case(
        "NaN in one sample",
        lambda dtype: Pointwise(_poisoned, b.to(dtype)),
        torch.zeros_like(b),
        solution,
        rate=0.5,
        stiffness=2.0,
        spoilt=0,
    )


_ONES = torch.ones(2, 3, 2, dtype=torch.float64)
_SINGULAR = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))

CASES = [
    _affine_case("contraction", torch.diag(torch.tensor([0.5, -0.3, 0.1, 0.8]))),
    _affine_case("quarter turn", _rotation(90, 0.9)),
    _affine_case("small turn", _rotation(30, 0.95)),
    _affine_case("expanding turn", _rotation(90, 1.5)),
    _affine_case("non-normal", torch.tensor([[0.5, 4.0, 0.0], [0.0, 0.5, 4.0], [0.0, 0.0, 0.5]])),
    _affine_case("defective", torch.tensor([[0.9, 1.0], [0.0, 0.9]])),
    _affine_case("expanding", torch.diag(torch.tensor([-1.5, 3.0]))),
    _affine_case("flat", torch.diag(torch.tensor([0.0, 0.99]))),
    _plain_case(
        "cosine", lambda z, b: torch.cos(z), _shift(2), solution=0.7390851332151607 * _ONES, rate=0.68
    ),
    # The slope at the fixed point is 1: plain iteration approaches it as 1/k.
    _plain_case("flat gradient", lambda z, b: z - z**3, 0.5 * _ONES, relative=False),
    _plain_case("many fixed points", lambda z, b: z @ _SINGULAR.to(z), _ONES, rate=0.5),
    _plain_case(
        "singular, none",
        lambda z, b: z @ _SINGULAR.to(z) + 1,
        0 * _ONES,
        relative=False,
        solvable=False,
    ),
    _plain_case("no fixed point", lambda z, b: z * z + 1, 0 * _ONES, relative=False, solvable=False),
    _plain_case("overflow", lambda z, b: 1e30 * z * z + 1, _ONES, relative=False, solvable=False),
    _plain_case("NaN everywhere", lambda z, b: z * math.nan, _ONES, solvable=False),
    _plain_case(
        "NaN late",
        lambda z, b: torch.where(z < 1.75, 0.5 * z + 1, torch.full_like(z, math.nan)),
        0 * _ONES,
        solvable=False,
    ),
    _poisoned_case(),
]


def assert_causal(state_of: Callable[[Tensor], Tensor], b: Tensor, positions: tuple[int, ...]) -> None:
    """A change of the input (B, T, C) at a position leaves all states before it the same, to the last bit."""
    before = state_of(b)
    for t in positions:
        changed = b.clone()
        changed[:, t] += 1.0
        assert torch.equal(state_of(changed)[:, :t], before[:, :t]), t
