"""The lean solve of independent lanes does what `solve` does, lane by lane."""

from __future__ import annotations

import pytest
import torch
from problems import solvable

from fairseq_deq.solvers import ConvergenceError, ConvergenceWarning, SolverConfig, Status, solve
from fairseq_deq.solvers.independent import solve_independent

NAMES = [problem.name for problem in solvable(torch.float64)]


class Lanes:
    """f(z) = tanh(gain_i A z + b_i) for lanes i (n, 1, C); `restrict` counts what it computes."""

    def __init__(self, gain: list[float], width: int = 6, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        own = torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.own = (own / torch.linalg.matrix_norm(own, 2)).to(dtype)
        self.gain = torch.tensor(gain, dtype=dtype).view(-1, 1)
        self.b = torch.randn(len(gain), width, generator=generator, dtype=torch.float64).to(dtype)
        self.z0 = torch.zeros(len(gain), 1, width, dtype=dtype)
        self.computed: list[int] = []

    def __call__(self, z):
        return self._at(z[:, 0], slice(None)).unsqueeze(1)

    def restrict(self, z, positions, value=None):
        return lambda rows: self._at(rows, positions)

    def _at(self, rows, lanes):
        self.computed.append(rows.shape[0])
        return torch.tanh(self.gain[lanes] * (rows @ self.own.T) + self.b[lanes])


def _same(config, f, z0):
    expected, result = solve(f, z0, config), solve_independent(f, z0, config)
    assert torch.equal(result.status, expected.status)
    assert torch.equal(result.lane_nfe, expected.lane_nfe)
    assert result.state.dtype == expected.state.dtype
    assert torch.allclose(result.state, expected.state, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert torch.allclose(result.residual, expected.residual, rtol=1e-3, atol=1e-12)
    return result


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("memory", [2, 3, 5])
def test_the_same_states_stops_and_counts(memory, budget):
    problem = Lanes([0.2, 1.5, 4.0, 0.9, 0.0])
    config = SolverConfig(memory=memory, max_evals=budget, rtol=1e-5, atol=0.0, damping=0.9)
    result = _same(config, problem, problem.z0)
    if budget == 40:
        assert len(set(result.lane_nfe.flatten().tolist())) > 2  # each lane stops by itself


@pytest.mark.parametrize("scope", ["position", "sample", "batch"])
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_known_fixed_points_are_found(index, scope):
    problem = solvable(torch.float64)[index]
    z0, solution = problem.z0[:, :1], problem.solution[:, :1]

    def first(z):
        return problem.f(torch.cat([z, problem.z0[:, 1:]], 1))[:, :1]

    config = SolverConfig(max_evals=400, patience=100, memory=8, rtol=1e-10, atol=0.0, scope=scope)
    result = solve_independent(first, z0, config)
    assert result.converged.all(), result.explain()
    assert torch.allclose(result.state, solution, rtol=1e-7, atol=1e-7)


def test_a_diverging_lane_restarts_as_in_solve():
    slopes = torch.tensor([3.0, 0.5, -1.4], dtype=torch.float64).view(3, 1, 1)
    config = SolverConfig(max_evals=30, rtol=1e-8, atol=0.0, memory=2)
    generator = torch.Generator().manual_seed(2)
    bump = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
    _same(config, lambda z: slopes * z + bump * torch.sin(40 * z) + 1.0, torch.ones(3, 1, 4).double())


def test_a_lane_without_a_fixed_point_is_not_converged():
    result = _same(SolverConfig(max_evals=40, rtol=0.0, atol=1e-3), lambda z: z + 1.0, torch.zeros(2, 1, 3))
    assert not result.converged.any()


def test_a_lane_that_is_not_finite_keeps_its_start_and_spoils_no_other():
    problem = Lanes([0.5, 0.5, 0.5])

    def f(z):
        fz = problem(z)
        return torch.where(torch.arange(3).view(3, 1, 1) == 1, float("nan"), fz)

    start = problem.z0 + 0.1
    result = _same(SolverConfig(max_evals=30, rtol=1e-6), f, start)
    assert result.status.flatten().tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.equal(result.state[1], start[1])


def test_converged_lanes_are_no_longer_evaluated():
    problem = Lanes([0.0] * 6 + [1.5] * 2)
    result = solve_independent(problem, problem.z0, SolverConfig(max_evals=60, rtol=1e-8, atol=0.0))
    assert result.converged.all()
    easy, hard = result.lane_nfe[0].item(), result.lane_nfe[-1].item()
    assert hard > easy + 2
    assert problem.computed[: easy + 1] == [8] * easy + [2]
    assert result.total_lane_nfe == sum(problem.computed)
    problem.computed.clear()
    config = SolverConfig(max_evals=60, rtol=1e-8, atol=0.0, active_set="never")
    solve_independent(problem, problem.z0, config)
    assert set(problem.computed) == {8}


def test_every_converged_lane_is_left_out_where_that_is_asked_for():
    problem = Lanes([0.0] + [1.5] * 7)
    config = SolverConfig(max_evals=60, rtol=1e-8, atol=0.0, active_set="always")
    result = solve_independent(problem, problem.z0, config)
    assert result.total_lane_nfe == result.lane_nfe.sum()


def test_a_lane_does_not_depend_on_its_company():
    gains = [0.2, 3.0, 1.0, 4.0]
    problem, config = Lanes(gains), SolverConfig(max_evals=50, rtol=1e-9, atol=0.0)
    together = solve_independent(problem, problem.z0, config)
    for lane in range(4):
        alone = solve_independent(
            lambda z, lane=lane: problem._at(z[:, 0], torch.tensor([lane])).unsqueeze(1),
            problem.z0[:1],
            config,
        )
        assert torch.allclose(alone.state[0], together.state[lane], atol=1e-12)
        assert alone.lane_nfe[0] == together.lane_nfe[lane]


def test_half_precision_is_solved_in_single():
    problem = Lanes([0.5, 0.9], dtype=torch.bfloat16)
    result = solve_independent(problem, problem.z0, SolverConfig(rtol=1e-2))
    assert result.state.dtype == torch.bfloat16
    assert result.residual.dtype == torch.float32
    assert result.converged.all()


def test_policies_are_those_of_solve():
    def f(z):
        return z + 1.0

    z0 = torch.zeros(1, 1, 3)
    with pytest.raises(ConvergenceError):
        solve_independent(f, z0, SolverConfig(max_evals=5, rtol=0.0, atol=1e-3, policy="raise"))
    with pytest.warns(ConvergenceWarning):
        solve_independent(f, z0, SolverConfig(max_evals=5, rtol=0.0, atol=1e-3, policy="fallback"))


@pytest.mark.parametrize("solver", ["broyden", "picard"])
def test_other_solvers_and_dependent_lanes_are_left_to_solve(solver):
    problem = Lanes([0.5, 0.9])
    config = SolverConfig(solver=solver, max_evals=100, rtol=1e-8, atol=0.0)
    assert torch.equal(
        solve_independent(problem, problem.z0, config).state, solve(problem, problem.z0, config).state
    )
    causal = solvable(torch.float64)[0]
    config = SolverConfig(max_evals=100, rtol=1e-8, atol=0.0)
    assert torch.equal(
        solve_independent(causal.f, causal.z0, config).state, solve(causal.f, causal.z0, config).state
    )
