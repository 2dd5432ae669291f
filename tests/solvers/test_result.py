"""What a solve says about itself: status, state and counts."""

from __future__ import annotations

import pytest
import torch
from problems import solvable

from fairseq_deq.solvers import SolverConfig, Status, solve

SOLVERS = ("anderson", "broyden", "picard")
SCOPES = ("position", "sample", "batch")


def _statuses(f, z0, config) -> set[Status]:
    return {Status(s) for s in solve(f, z0, config).status.flatten().tolist()}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_map_that_only_grows_has_diverged(scope):
    config = SolverConfig("picard", max_evals=60, scope=scope)
    assert _statuses(lambda z: 3.0 * z + 1.0, torch.ones(2, 3, 4), config) == {Status.DIVERGED}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("solver", ["anderson", "picard"])
def test_a_residual_that_never_falls_has_stalled(solver, scope):
    config = SolverConfig(solver, max_evals=60, scope=scope, rtol=0.0, atol=1e-3)
    assert _statuses(lambda z: z + 1.0, torch.zeros(2, 3, 4), config) == {Status.STALLED}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_into_nan_is_non_finite_and_keeps_the_start(solver, scope):
    z0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    result = solve(lambda z: z * float("nan"), z0, SolverConfig(solver, max_evals=30, scope=scope))
    assert (result.status == Status.NON_FINITE).all()
    assert torch.equal(result.state, z0)
    assert torch.isinf(result.residual).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_that_ends_on_the_way_down_is_max_iter(solver):
    problem = solvable(torch.float64)[0]
    config = SolverConfig(solver, max_evals=3, rtol=1e-12, atol=0.0)
    assert _statuses(problem.f, problem.z0, config) == {Status.MAX_ITER}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("length", [1, 2])
def test_an_oscillating_lane_is_damped_until_it_settles(scope, length):
    result = solve(lambda z: 1.0 - z, torch.zeros(2, length, 3), SolverConfig("picard", scope=scope))
    assert result.converged.all(), result.explain()
    assert torch.allclose(result.state, torch.full_like(result.state, 0.5), atol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_lane_that_converged_returns_the_state_that_did(scope):
    """0 -> 1 -> 501 -> 503: the last distance, 2, exceeds the first, 1, but is small for a state so large."""

    def f(z):
        return z + torch.where(z < 0.5, 1.0, torch.where(z < 1.5, 500.0, 2.0))

    result = solve(f, torch.zeros(1, 1, 1), SolverConfig("picard", rtol=1e-2, scope=scope))
    assert result.converged.all()
    assert result.state.item() == 501.0
    assert result.residual.item() == pytest.approx(2.0 / 503.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_bfloat16_is_solved_in_float32_and_returned_as_it_came(solver):
    seen = set()

    def f(z):
        seen.add(z.dtype)
        return torch.cos(z)

    z0 = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    result = solve(f, z0, SolverConfig(solver, rtol=1e-2))
    assert seen == {result.state.dtype} == {torch.bfloat16}
    assert result.residual.dtype == torch.float32
    assert result.converged.all()
    assert torch.allclose(result.state.float(), torch.full((2, 3, 4), 0.739085), atol=1e-2)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_evaluation_of_f_is_counted(solver, scope):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return torch.cos(z)

    result = solve(f, torch.zeros(2, 5, 3), SolverConfig(solver, max_evals=17, rtol=1e-7, scope=scope))
    lanes = {"position": 10, "sample": 2, "batch": 1}[scope]
    assert result.nfe == calls <= 17
    assert result.total_lane_nfe == calls * lanes == result.nfe * result.status.numel()
    assert (result.lane_nfe <= calls).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("budget", [2, 5, 20])  # one evaluation says nothing of another state than the start
def test_the_best_state_is_never_worse_than_the_start(solver, budget):
    def f(z):
        return 2.0 * torch.sin(3.0 * z) + 1.5  # chaotic under plain iteration

    z0 = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 1, 6)
    result = solve(f, z0, SolverConfig(solver, max_evals=budget, rtol=1e-10, scope="sample"))
    before = (f(z0) - z0).flatten(1).norm(dim=1)
    after = (f(result.state) - result.state).flatten(1).norm(dim=1)
    assert (after <= before).all()
