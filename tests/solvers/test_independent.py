"""Lanes that depend on nothing but themselves: a textbook's states, their own stops, and no rechecks."""

from __future__ import annotations

import pytest
import torch
from problems import rowwise, solvable

from fairseq_deq.solvers import ConvergenceError, ConvergenceWarning, SolverConfig, Status, solve

NAMES = [problem.name for problem in solvable(torch.float64)]
SOLVERS = ("anderson", "broyden", "picard")


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
        return self.at(z[:, 0], slice(None)).unsqueeze(1)

    def restrict(self, z, positions, value=None):
        return lambda rows: self.at(rows, positions)

    def alone(self, lane: int):
        """f of one lane."""
        return lambda z: self.at(z[:, 0], torch.tensor([lane])).unsqueeze(1)

    def at(self, rows, lanes):
        self.computed.append(rows.shape[0])
        return torch.tanh(self.gain[lanes] * rowwise(rows, self.own) + self.b[lanes])


def _textbook_anderson(f, z0, config: SolverConfig):
    """One lane, (C,), by dense least squares: the best state, and the evaluations that it took."""
    states, residuals, best = [], [], (float("inf"), z0)
    z = z0
    for k in range(config.max_evals):
        fz = f(z)
        g = fz - z
        if g.norm() < best[0]:
            best = (g.norm(), z)
        if g.norm() <= config.rtol * fz.norm():
            return z, k + 1
        if config.max_evals == 1:  # made use of, though nobody knows how good it is
            return fz, 1
        states, residuals = [*states, z][-config.memory :], [*residuals, g][-config.memory :]
        z = z + config.damping * g
        if len(states) > 1:
            dz = torch.stack([states[-1] - s for s in states[:-1]], 1)
            dg = torch.stack([residuals[-1] - r for r in residuals[:-1]], 1)
            gamma = torch.linalg.lstsq(dg, g.unsqueeze(1)).solution.squeeze(1)
            z = z - dz @ gamma - config.damping * (dg @ gamma)
    return best[1], config.max_evals


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("memory", [2, 3, 5])
def test_anderson_has_the_states_stops_and_counts_of_a_textbook(memory, budget):
    problem = Lanes([0.2, 1.5, 2.5, 0.9, 0.0])
    config = SolverConfig(
        memory=memory, max_evals=budget, rtol=1e-5, atol=0.0, damping=0.9, ridge=0.0, patience=50
    )
    result = solve(problem, problem.z0, config)
    for lane in range(5):
        f = problem.alone(lane)
        state, evaluations = _textbook_anderson(
            lambda z, f=f: f(z.view(1, 1, -1)).flatten(), problem.z0[lane, 0], config
        )
        assert torch.allclose(result.state[lane, 0], state, rtol=1e-6, atol=1e-8), lane
        assert result.lane_nfe[lane, 0] == evaluations
    if budget == 40:
        assert result.converged.all()
        assert len(set(result.lane_nfe.flatten().tolist())) > 2  # each lane stops by itself


@pytest.mark.parametrize("scope", ["position", "sample", "batch"])
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_known_fixed_points_are_found(index, scope):
    problem = solvable(torch.float64)[index]
    z0, solution = problem.z0[:, :1], problem.solution[:, :1]

    def first(z):
        return problem.f(torch.cat([z, problem.z0[:, 1:]], 1))[:, :1]

    config = SolverConfig(max_evals=400, patience=100, memory=8, rtol=1e-10, atol=0.0, scope=scope)
    result = solve(first, z0, config)
    assert result.converged.all(), result.explain()
    assert torch.allclose(result.state, solution, rtol=1e-7, atol=1e-7)


def test_a_lane_without_a_fixed_point_is_not_converged():
    result = solve(lambda z: z + 1.0, torch.zeros(2, 1, 3), SolverConfig(max_evals=40, rtol=0.0, atol=1e-3))
    assert not result.converged.any()


def test_a_lane_that_is_not_finite_keeps_its_start_and_spoils_no_other():
    problem = Lanes([0.5, 0.5, 0.5])

    def f(z):
        fz = problem(z)
        return torch.where(torch.arange(3).view(3, 1, 1) == 1, float("nan"), fz)

    start, config = problem.z0 + 0.1, SolverConfig(max_evals=30, rtol=1e-6)
    result = solve(f, start, config)
    assert result.status.flatten().tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.equal(result.state[1], start[1])
    clean = solve(problem, start, config)
    assert torch.equal(result.state[[0, 2]], clean.state[[0, 2]])


@pytest.mark.parametrize("solver", SOLVERS)
def test_there_are_no_rechecks_and_the_slowest_lane_ends_the_solve(solver):
    problem = Lanes([0.0, 0.3, 0.9])
    config = SolverConfig(solver, max_evals=200, rtol=1e-8, atol=0.0, first_recheck=3)
    result = solve(problem, problem.z0, config)
    assert result.converged.all()
    assert result.nfe == len(problem.computed) == int(result.lane_nfe.max()) > 3


def test_converged_lanes_are_no_longer_evaluated():
    problem = Lanes([0.0] * 6 + [1.5] * 2)
    result = solve(problem, problem.z0, SolverConfig(max_evals=60, rtol=1e-8, atol=0.0))
    assert result.converged.all()
    easy, hard = result.lane_nfe[0].item(), result.lane_nfe[-1].item()
    assert hard > easy + 2
    assert problem.computed[: easy + 1] == [8] * easy + [2]
    assert result.total_lane_nfe == sum(problem.computed)
    problem.computed.clear()
    config = SolverConfig(max_evals=60, rtol=1e-8, atol=0.0, active_set="never")
    solve(problem, problem.z0, config)
    assert set(problem.computed) == {8}


def test_every_converged_lane_is_left_out_where_that_is_asked_for():
    problem = Lanes([0.0] + [1.5] * 7)
    config = SolverConfig(max_evals=60, rtol=1e-8, atol=0.0, active_set="always")
    result = solve(problem, problem.z0, config)
    assert result.total_lane_nfe == result.lane_nfe.sum()


@pytest.mark.parametrize("active_set", ["always", "auto", "never"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_lane_does_not_depend_on_its_company_bit_by_bit_restarts_included(solver, active_set):
    problem = Lanes([0.2, 3.0, 1.0, 8.0])
    for budget in range(1, 41):
        config = SolverConfig(
            solver, max_evals=budget, rtol=1e-9, atol=0.0, active_set=active_set, patience=3
        )
        together = solve(problem, problem.z0, config)
        for lane in range(4):
            alone = solve(problem.alone(lane), problem.z0[:1], config)
            for name in ("state", "lane_nfe", "status", "residual"):
                assert torch.equal(getattr(alone, name)[0], getattr(together, name)[lane]), (budget, name)


def test_half_precision_is_solved_in_single():
    problem = Lanes([0.5, 0.9], dtype=torch.bfloat16)
    result = solve(problem, problem.z0, SolverConfig(rtol=1e-2))
    assert result.state.dtype == torch.bfloat16
    assert result.residual.dtype == torch.float32
    assert result.converged.all()


def test_the_policies():
    def f(z):
        return z + 1.0

    z0 = torch.zeros(1, 1, 3)
    with pytest.raises(ConvergenceError):
        solve(f, z0, SolverConfig(max_evals=5, rtol=0.0, atol=1e-3, policy="raise"))
    with pytest.warns(ConvergenceWarning):
        solve(f, z0, SolverConfig(max_evals=5, rtol=0.0, atol=1e-3, policy="fallback"))
