"""Lanes do not see each other: causality, batch mates, waking and the work saved, on the layer itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bound_layers import FAMILIES, B, C, T, transformer
from problems import Relay
from selection import every_pair

from fairseq_deq.solvers import SolverConfig, Status, solve

SOLVERS = ("anderson", "broyden", "picard")
DTYPES = [torch.float32, torch.float64]
# With weights this wild (std 0.6) hardly a lane converges within the budgets; with the others much has.
WEIGHTS = {"wild": (0.6, 1e-8), "converging": (0.05, 1e-2)}


def _injection(dtype: torch.dtype) -> torch.Tensor:
    return FAMILIES[0].injection(dtype)


@torch.no_grad()
def _solved(injection: torch.Tensor, gain: float, config: SolverConfig):
    return solve(transformer(injection, gain), injection.new_zeros(*injection.shape[:2], C), config)


@every_pair(solver=SOLVERS, dtype=DTYPES, active_set=("always", "auto", "never"), weights=WEIGHTS)
def test_the_past_is_bitwise_blind_to_the_future_at_every_budget(
    solver, dtype, active_set, weights, thorough
):
    (gain, rtol), injection = weights, _injection(dtype)
    # Every budget where a lane is left out as soon as can be, and in slow cases; some of them in the others.
    for budget in range(1, 21) if active_set == "always" or thorough else (1, 2, 3, 6, 13, 20):
        config = SolverConfig(solver, max_evals=budget, rtol=rtol, atol=0.0, active_set=active_set)
        before = _solved(injection, gain, config)
        t = (7 * budget) % T
        changed = injection.clone()
        changed[:, t] += 1.0
        after = _solved(changed, gain, config)
        assert torch.equal(after.state[:, :t], before.state[:, :t]), budget
        assert torch.equal(after.status[:, :t], before.status[:, :t]), budget
        if budget > 1:
            assert not torch.equal(after.state[:, t], before.state[:, t]), budget


def test_the_wild_cell_is_far_from_solved_and_the_other_is_not():
    config = SolverConfig(max_evals=20, rtol=1e-8, atol=0.0)
    injection = _injection(torch.float64)
    assert _solved(injection, 0.6, config).converged.float().mean() < 0.1
    assert _solved(injection, 0.05, replace(config, rtol=1e-2)).converged.float().mean() > 0.5


@every_pair(solver=SOLVERS, dtype=DTYPES, weights=WEIGHTS)
def test_a_sample_alone_is_bitwise_the_sample_in_the_batch(solver, dtype, weights):
    (gain, rtol), injection = weights, _injection(dtype)
    for budget in (1, 4, 9, 20):
        config = SolverConfig(solver, max_evals=budget, rtol=rtol, atol=0.0)
        together, alone = _solved(injection, gain, config), _solved(injection[:1], gain, config)
        assert torch.equal(alone.state[0], together.state[0]), budget
        assert torch.equal(alone.lane_nfe[0], together.lane_nfe[0]), budget
        assert torch.equal(alone.status[0], together.status[0]), budget


@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_spoilt_batch_mate_changes_nothing(solver, spoiler):
    config = SolverConfig(solver, max_evals=15, rtol=1e-4)
    injection = _injection(torch.float32)
    clean = _solved(injection, 0.05, config)
    injection[1, 3:] = spoiler
    spoilt = _solved(injection, 0.05, config)
    assert torch.equal(spoilt.state[[0, 2]], clean.state[[0, 2]])
    assert torch.isfinite(spoilt.state).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_active_set_saves_work_and_no_bit_changes(solver, dtype):
    injection = _injection(dtype)
    for budget, rtol in ((20, 3e-2), (60, 1e-2)):
        config = SolverConfig(solver, max_evals=budget, rtol=rtol, active_set="always")
        on, off = (
            _solved(injection, 0.05, config),
            _solved(injection, 0.05, replace(config, active_set="never")),
        )
        assert torch.equal(on.state, off.state)
        assert torch.equal(on.status, off.status)
        assert torch.equal(on.lane_nfe, off.lane_nfe)
        assert off.total_lane_nfe == off.nfe * B * T
        assert on.total_lane_nfe < off.total_lane_nfe


# ---------------------------------------------------------------------- lanes that wake

HISTORIES = [("anderson", 3), ("anderson", 4), ("broyden", 3), ("broyden", 0), ("picard", 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("solver", "memory"), HISTORIES)
def test_a_woken_lane_does_not_know_who_moved_while_it_slept(solver, memory, dtype):
    for budget in range(1, 25):
        config = SolverConfig(solver, max_evals=budget, rtol=1e-9, atol=0.0, memory=memory)
        resting, moving = (
            solve(f := Relay(torch.tensor([third], dtype=dtype)), f.z0, config) for third in (0.0, 1.0)
        )
        assert torch.equal(resting.state[:, :2], moving.state[:, :2]), budget
        assert torch.equal(resting.status[:, :2], moving.status[:, :2]), budget


@pytest.mark.parametrize(("solver", "memory"), HISTORIES)
def test_a_woken_lane_does_not_know_which_batch_mates_moved(solver, memory):
    for budget in range(1, 25):
        config = SolverConfig(solver, max_evals=budget, rtol=1e-9, atol=0.0, memory=memory)
        alone, together = (
            solve(f := Relay(torch.tensor(thirds, dtype=torch.float64)), f.z0, config)
            for thirds in ([0.0], [0.0, 1.0])
        )
        assert torch.equal(alone.state[0], together.state[0]), budget


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_lane_that_rested_at_nothing_is_woken_and_solved(solver):
    f = Relay(torch.ones(2, dtype=torch.float64))
    result = solve(f, f.z0, SolverConfig(solver, max_evals=200, rtol=1e-8, atol=0.0))
    assert result.converged.all(), result.explain()
    assert (result.state[:, 1].norm(dim=-1) > 0.1).all()
    assert torch.allclose(f(result.state), result.state, rtol=0, atol=1e-7)


def test_a_woken_lane_has_not_diverged_for_having_rested_at_zero_residual():
    f = Relay(torch.zeros(1, dtype=torch.float64))
    result = solve(f, f.z0, SolverConfig("picard", max_evals=9, rtol=1e-9, atol=0.0))
    assert result.status[0].tolist() == [Status.CONVERGED, Status.MAX_ITER, Status.CONVERGED]


@pytest.mark.parametrize("budget", [2, 3, 4, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_lane_at_rest_whose_inputs_moved_on_is_not_called_converged(solver, budget):
    f = Relay(torch.zeros(1, dtype=torch.float64))
    result = solve(f, f.z0, SolverConfig(solver, max_evals=budget, rtol=1e-9, atol=0.0))
    assert result.converged[0].tolist() == [True, False, True]
    assert result.residual[0, 1] > 0.1
