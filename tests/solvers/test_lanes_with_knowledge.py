"""With a preconditioner and a start better than zero, lanes still do not see each other: both families."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from bound_layers import FAMILIES, B, Family, Known, T
from selection import every_pair

from fairseq_deq.solvers import FixedPoint, SolverConfig, solve

SOLVERS = ("anderson", "broyden", "picard")
DTYPES = [torch.float32, torch.float64]
# One that hardly converges within the budgets, and one that mostly does; and what is asked of each.
LAYERS = {"wild": (0, 1e-8), "converging": (1, 1e-2)}
known = cache(Known.of)


def _padding(rows: slice = slice(None)) -> torch.Tensor:
    """(B, T): none in the first row, 3 on the left of the second, 4 on the right of the third."""
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, :3] = padding[2, -4:] = True
    return padding[rows]


@torch.no_grad()
def _solved(
    family: Family, which: int, u: torch.Tensor, config: SolverConfig, padding: torch.Tensor | None = None
) -> FixedPoint:
    knows = known(family, which, u.dtype)
    return solve(family.binds[which](u, padding=padding), knows.start(u), config, knows.preconditioner)


def _config(
    family: Family, solver: str, budget: int, rtol: float, active_set: str = "always"
) -> SolverConfig:
    return SolverConfig(
        solver, max_evals=budget, rtol=rtol, atol=0.0, active_set=active_set, scope=family.scope
    )


def _budgets(family: Family, dtype: torch.dtype, active_set: str) -> tuple[int, ...]:
    """Every budget up to 20 where a lane is left out as soon as can be; some of them in the other cases."""
    if family.scope == "recurrence":  # solved position after position: the budget is that of one of them
        return (1, 2, 5, 13)
    return tuple(range(1, 21)) if active_set == "always" and dtype == torch.float32 else (1, 2, 3, 6, 13, 20)


def _changed(u: torch.Tensor, budget: int) -> tuple[torch.Tensor, int]:
    t = (7 * budget) % T
    changed = u.clone()
    changed[:, t] += 1.0
    return changed, t


@every_pair(
    family=FAMILIES, solver=SOLVERS, dtype=DTYPES, active_set=("always", "auto", "never"), layer=LAYERS
)
def test_the_past_is_bitwise_blind_to_the_future_at_every_budget(family, solver, dtype, active_set, layer):
    (which, rtol), u = layer, family.injection(dtype)
    padding = None if active_set == "auto" else _padding()
    for budget in _budgets(family, dtype, active_set):
        config = _config(family, solver, budget, rtol, active_set)
        before = _solved(family, which, u, config, padding)
        changed, t = _changed(u, budget)
        after = _solved(family, which, changed, config, padding)
        for name in ("state", "status", "lane_nfe", "residual"):
            assert torch.equal(getattr(after, name)[:, :t], getattr(before, name)[:, :t]), (budget, name)
        if budget > 1:
            assert not torch.equal(after.state[0, t], before.state[0, t]), budget


@every_pair(
    family=FAMILIES, solver=SOLVERS, dtype=DTYPES, padded={"whole": False, "padded": True}, layer=LAYERS
)
def test_a_sample_alone_is_bitwise_the_sample_in_the_batch(family, solver, dtype, padded, layer):
    (which, rtol), u = layer, family.injection(dtype)
    for budget in (1, 2, 4, 9, 13, 20):
        config = _config(family, solver, budget, rtol)
        together = _solved(family, which, u, config, _padding() if padded else None)
        # The layer's own settled past is that of the first rows.
        alone = _solved(family, which, u[:1], config, _padding(slice(0, 1)) if padded else None)
        for name in ("state", "status", "lane_nfe", "residual"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[0]), (budget, name)


@every_pair(family=FAMILIES[1:], solver=SOLVERS, dtype=DTYPES)
def test_how_far_a_batch_is_padded_on_the_right_changes_no_bit(family, solver, dtype):
    """Of a TrellisNet, whose products are as long for every T."""
    u, which = family.injection(dtype), 0
    for budget in (1, 3, 7, 13, 20):
        config = _config(family, solver, budget, 1e-8)
        short, long = (_solved(family, which, x, config) for x in (u[:, :17], u))
        assert torch.equal(long.state[:, :17], short.state), budget
        assert torch.equal(long.status[:, :17], short.status), budget


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_wild_layer_is_far_from_solved_and_the_other_is_not(family):
    u = family.injection(torch.float64)
    shares = [
        _solved(family, which, u, _config(family, "anderson", 20, rtol)).converged.float().mean()
        for which, rtol in LAYERS.values()
    ]
    if family.scope == "position":
        assert shares[0] < 0.5
    assert shares[1] > 0.5


@every_pair(family=FAMILIES, solver=SOLVERS, spoiler=(float("nan"), float("inf"), 1e30))
def test_a_spoilt_batch_mate_changes_nothing(family, solver, spoiler):
    config, which = _config(family, solver, 15, 1e-4), 1
    u = family.injection(torch.float32)
    clean = _solved(family, which, u, config)
    spoilt = u.clone()
    spoilt[1, 3:] = spoiler
    knows = known(family, which, u.dtype)
    starts = knows.start(u)
    with torch.no_grad():
        found = solve(family.binds[which](spoilt), starts, config, knows.preconditioner)
    for name in ("state", "status", "lane_nfe"):
        assert torch.equal(getattr(found, name)[[0, 2]], getattr(clean, name)[[0, 2]]), name
    assert torch.isfinite(found.state).all()


@every_pair(family=FAMILIES[:2], solver=SOLVERS, dtype=DTYPES)
def test_which_lanes_are_evaluated_changes_no_bit(family, solver, dtype):
    u, which = family.injection(dtype), 1
    for budget, rtol in ((20, 3e-2), (60, 1e-3)):
        on, off = (
            _solved(family, which, u, _config(family, solver, budget, rtol, active_set))
            for active_set in ("always", "never")
        )
        for name in ("state", "status", "lane_nfe"):
            assert torch.equal(getattr(on, name), getattr(off, name)), (budget, name)
        assert off.total_lane_nfe == off.nfe * B * T
        assert on.total_lane_nfe < off.total_lane_nfe


@pytest.mark.parametrize("family", FAMILIES[2:], ids=lambda f: f.name)
def test_what_is_known_saves_evaluations(family):
    u, config = family.injection(torch.float64), _config(family, "anderson", 60, 1e-3)
    with torch.no_grad():
        plain = solve(family.binds[1](u), u.new_zeros(B, T, family.state_dim), config)
    found = _solved(family, 1, u, config)
    assert found.converged.float().mean() >= plain.converged.float().mean()
    assert found.lane_nfe.sum() < 0.97 * plain.lane_nfe.sum()
