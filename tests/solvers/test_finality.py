"""A lane that passes behind final lanes is final: not evaluated again, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bound_layers import FAMILIES
from problems import CausalMap
from torch import Tensor

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.solvers import Preconditioner, SolverConfig, direction_of, solve

SOLVERS = ("anderson", "broyden", "picard")
B, T, C = 4, 16, 3


class Asked:
    """Lanes that settle at once, save for some that never do; notes which lanes each evaluation was for.

    Args:
        hard: flat positions of those that never settle.
        direction: which positions are said to come first.
    """

    def __init__(self, hard: list[int], direction: int) -> None:
        self.slope, self.direction = torch.zeros(B * T, 1, dtype=torch.float64), direction
        self.slope[hard] = 1.0
        self.lanes: list[set[int]] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.lanes.append(set(range(B * T)))
        return (self.slope * z.view(-1, C) + 1.0).view_as(z)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        def f(rows: Tensor) -> Tensor:
            self.lanes.append(set(positions.tolist()))
            return self.slope[positions] * rows + 1.0

        return f


FIRST_RECHECK = 4
# Rechecks of a budget of 12 evaluations; lanes are filled up to 16 in between, so it is these that tell.
CONFIG = SolverConfig(
    "picard", max_evals=12, rtol=1e-3, atol=0.0, first_recheck=FIRST_RECHECK, patience=50, active_set="always"
)


def _at_the_first_recheck(hard: list[int], direction: int, solver: str) -> set[int]:
    f = Asked(hard, direction)
    solve(f, torch.zeros(B, T, C, dtype=torch.float64), replace(CONFIG, solver=solver))
    return f.lanes[FIRST_RECHECK]


def _row(sample: int, first: int = 0, last: int = T) -> set[int]:
    return set(range(sample * T + first, sample * T + last))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("direction", "place", "open_lanes"),
    [
        (1, 15, _row(1, 15)),  # all before it are final
        (1, 0, _row(1)),  # nothing after it is
        (1, 5, _row(1, 5)),
        (-1, 15, _row(1)),
        (-1, 0, _row(1, 0, 1)),
        (-1, 5, _row(1, 0, 6)),
        (0, 15, _row(1)),  # its sample has not passed as a whole
        (0, 0, _row(1)),
    ],
)
def test_a_recheck_evaluates_what_is_not_final(direction, place, open_lanes, solver):
    asked = _at_the_first_recheck([T + place], direction, solver)
    assert asked == open_lanes


@pytest.mark.parametrize("direction", [1, -1, 0])
def test_without_restriction_every_lane_is_evaluated(direction):
    f = Asked([T], direction)
    solve(f, torch.zeros(B, T, C, dtype=torch.float64), replace(CONFIG, active_set="never"))
    assert all(lanes == set(range(B * T)) for lanes in f.lanes)


@pytest.mark.parametrize("direction", [1, -1, 0])
@pytest.mark.parametrize("active_set", ["always", "never"])
def test_a_solve_ends_when_all_is_final_though_rechecks_are_ahead(direction, active_set):
    f = Asked([], direction)
    config = replace(CONFIG, first_recheck=8, active_set=active_set)
    result = solve(f, torch.zeros(B, T, C, dtype=torch.float64), config)
    assert result.converged.all()
    assert result.nfe == len(f.lanes) == 2


# ---------------------------------------------------------------------- coupled lanes


class Ordered(CausalMap):
    """`CausalMap` that says so."""

    direction = 1


class Backwards:
    """The mirror image: a position depends on itself and those after it."""

    direction = -1

    def __init__(self, f: CausalMap) -> None:
        self.f = f

    def __call__(self, z: Tensor) -> Tensor:
        return self.f(z.flip(1)).flip(1)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        length = z.shape[1]
        sample, time = positions // length, positions % length
        mirrored, order = (sample * length + length - 1 - time).sort()
        inner = self.f.restrict(z.flip(1), mirrored, None)
        return lambda rows: inner(rows[order])[order.argsort()]


def _problem(kind: type[CausalMap], dtype: torch.dtype = torch.float64, gain: float = 1.2) -> CausalMap:
    b = torch.randn(3, 32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return kind(b.to(dtype), gain)


def _knowledge(active_set: str, solver: str, budget: int) -> tuple[SolverConfig, Preconditioner]:
    generator = torch.Generator().manual_seed(1)
    left, right = (0.3 * torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    config = SolverConfig(solver, max_evals=budget, rtol=1e-4, atol=0.0, active_set=active_set)
    return config, Preconditioner(left, right)


@pytest.mark.parametrize("active_set", ["always", "never"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_finality_saves_work_and_changes_no_bit(solver, active_set):
    saved = []
    for budget in (*range(1, 21), 60):
        config, p = _knowledge(active_set, solver, budget)
        told, untold = _problem(Ordered), _problem(CausalMap)
        assert (direction_of(told), direction_of(untold)) == (1, 0)
        z0 = torch.zeros_like(told.b)
        on, off = solve(told, z0, config, p), solve(untold, z0, config, p)
        for name in ("state", "status", "lane_nfe"):
            assert torch.equal(getattr(on, name), getattr(off, name)), (budget, name)
        assert on.nfe <= off.nfe
        assert on.total_lane_nfe == told.rows <= off.total_lane_nfe
        saved.append(off.total_lane_nfe - on.total_lane_nfe)
    assert saved[-1] > 0 or active_set == "never"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_from_the_other_end_it_is_the_mirror_image(solver, dtype):
    for budget in (1, 5, 12, 13, 20, 60):
        config, p = _knowledge("always", solver, budget)
        forwards = _problem(Ordered, dtype)
        backwards = Backwards(_problem(CausalMap, dtype))
        z0 = torch.zeros_like(forwards.b)
        one, other = solve(forwards, z0, config, p), solve(backwards, z0, config, p)
        for name in ("state", "status", "lane_nfe"):
            assert torch.equal(getattr(other, name).flip(1), getattr(one, name)), (budget, name)
        assert (other.nfe, other.total_lane_nfe) == (one.nfe, one.total_lane_nfe)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_final_lane_is_what_it_will_be_with_any_budget_to_come(solver):
    """Its state is its own, whatever lanes after it do from then on.

    At the end of a budget the tolerance is enough, where between rechecks a fifth less is asked for: lanes
    that end in between, and all after them, are left out.
    """
    config, p = _knowledge("always", solver, 60)
    f = _problem(Ordered)
    z0 = torch.zeros_like(f.b)
    last = solve(f, z0, config, p)
    for budget in (8, 13, 20):
        early = solve(f, z0, replace(config, max_evals=budget), p)
        enough = early.converged & (early.residual <= 0.8 * config.rtol)
        final = enough.int().cumprod(1).bool()
        assert torch.equal(early.state[final], last.state[final])
    assert final.any()


# ---------------------------------------------------------------------- who says so


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda f: f.name)
def test_the_layers_run_forwards_and_their_adjoints_backwards(family):
    u = family.injection(torch.float64)
    f = family.binds[1](u)
    zeros = u.new_zeros(*u.shape[:2], family.state_dim)
    assert direction_of(f) == 1
    assert direction_of(f.adjoint(zeros, zeros)) == -1
    assert direction_of(torch.tanh) == 0


class _Plain:
    """A causal map of one's own with a direction, without an adjoint; with `restrict` or without."""

    direction = 1

    def __init__(self, x: Tensor) -> None:
        self.x, self.calls = x, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        earlier = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
        return torch.tanh(0.4 * z + 0.4 * earlier + self.x)


class _PlainRestrictable(_Plain):
    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        def f(rows: Tensor) -> Tensor:
            whole = z.reshape(-1, z.shape[-1]).index_copy(0, positions, rows).view_as(z)
            return self(whole).view(-1, z.shape[-1]).index_select(0, positions)

        return f


@pytest.mark.parametrize("kind", [_Plain, _PlainRestrictable])
def test_the_adjoint_of_a_map_of_ones_own_runs_the_other_way(kind):
    """A gradient at the first position alone is settled before anything after it; it ends at once there."""
    x = torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tight = SolverConfig("anderson", max_evals=200, rtol=1e-8, atol=0.0)
    found = []
    for direction in (1, 0):
        leaf = x.clone().requires_grad_()
        f = kind(leaf)
        f.direction = direction
        equilibrium = fixed_point(f, torch.zeros_like(x), tight, GradientConfig(solver=tight))
        equilibrium.state.cos().sum().backward()
        assert equilibrium.backward.sums[4] == equilibrium.backward.sums[0] == 48
        found.append((leaf.grad, float(equilibrium.backward.sums[2])))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert found[0][1] <= found[1][1]
