"""`solve_few`: what `solve` finds, by another road, and by `solve` itself where a lane is lost."""

from __future__ import annotations

import pytest
import torch

from fairseq_deq.solvers import (
    ConvergenceError,
    Preconditioner,
    SolverConfig,
    Status,
    few_lanes,
    solve,
    solve_few,
)

WIDTH = 12


class Maps:
    """f(z) = tanh(gain * A z + b_i) for lanes i, (N, 1, C); it counts its evaluations."""

    def __init__(self, lanes: int, gain: float, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(lanes)
        matrix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.matrix = (gain * matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype)
        self.b = torch.randn(lanes, 1, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.z0, self.evaluations = torch.zeros_like(self.b), 0

    def __call__(self, z):
        self.evaluations += 1
        return torch.tanh(z @ self.matrix + self.b)


@pytest.fixture
def never_solve(monkeypatch):
    """`solve` is not to be called."""

    def refuse(*_args):
        raise AssertionError("the lanes settle by themselves")

    monkeypatch.setattr(few_lanes, "solve", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [0, 2, 4])
@pytest.mark.parametrize("lanes", [1, 2, 16])
@pytest.mark.parametrize("with_p", [False, True])
def test_it_is_solve(never_solve, lanes, memory, dtype, with_p):
    f = Maps(lanes, 0.9, dtype)
    jacobian = (f.matrix * 0.3).T.contiguous()
    p = Preconditioner.from_jacobian(jacobian, 4) if with_p else None
    config = SolverConfig(rtol=1e-4, max_evals=60, memory=memory)
    expected, found = solve(f, f.z0, config, p), solve_few(f, f.z0, config, p)
    assert bool(expected.converged.all())
    assert bool(found.converged.all())
    assert torch.equal(found.lane_nfe, expected.lane_nfe)
    assert (found.nfe, found.lane_nfe.dtype) == (expected.nfe, expected.lane_nfe.dtype)
    assert found.total_lane_nfe == found.nfe * lanes
    assert found.state.shape == f.z0.shape
    assert found.state.dtype == dtype
    torch.testing.assert_close(found.state, expected.state, rtol=1e-3, atol=1e-6)
    residual = (f(found.state) - found.state).norm(dim=-1) / f(found.state).norm(dim=-1)
    assert bool((residual <= 1.1e-4).all())
    torch.testing.assert_close(found.residual, residual, rtol=1e-2, atol=1e-7)


def test_a_lane_at_rest_is_left_alone(never_solve):
    f = Maps(3, 0.9)
    f.z0[1] = solve(f, f.z0, SolverConfig(rtol=1e-12, max_evals=200)).state[1]
    found = solve_few(f, f.z0, SolverConfig(rtol=1e-4, max_evals=60))
    assert torch.equal(found.state[1], f.z0[1])
    assert found.lane_nfe[1] == 1
    assert bool((found.lane_nfe[[0, 2]] > 3).all())


@pytest.mark.parametrize("budget", [1, 3, 5, 9])
def test_the_budget_is_kept(budget):
    f = Maps(4, 0.99)
    found = solve_few(f, f.z0, SolverConfig(rtol=1e-12, max_evals=budget))
    assert f.evaluations == found.nfe == budget
    assert not bool(found.converged.any())
    assert bool((found.lane_nfe <= budget).all())
    longer = solve_few(f, f.z0, SolverConfig(rtol=1e-12, max_evals=budget + 10))
    assert bool((longer.residual < found.residual).all())


def test_where_lanes_are_lost_solve_goes_on():
    f = Maps(6, 6.0)
    config = SolverConfig(rtol=1e-6, max_evals=200)
    expected, found = solve(f, f.z0, config), solve_few(f, f.z0, config)
    # Two of them have no equilibrium within reach; the others take restarts.
    assert found.status.tolist() == expected.status.tolist()
    assert expected.count(Status.STALLED) == 2
    assert int(found.lane_nfe.min()) > 12
    assert bool((found.residual[found.converged] <= 3e-6).all())


def test_a_lane_that_is_never_finite():
    f = Maps(3, 0.5)
    f.b[1] = float("nan")
    found = solve_few(f, f.z0, SolverConfig(max_evals=40))
    assert found.status[:, 0].tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert bool(torch.isfinite(found.state).all())


def test_policies_and_mistakes():
    f = Maps(2, 0.99)
    with pytest.raises(ConvergenceError):
        solve_few(f, f.z0, SolverConfig(rtol=1e-12, max_evals=12, policy="raise"))
    with pytest.raises(ValueError, match=r"made \(2, 1, 11\) out of \(2, 1, 12\)"):
        solve_few(lambda z: f(z)[..., 1:], f.z0, SolverConfig())
    with pytest.raises(ValueError, match="z0 must be of a floating-point type"):
        solve_few(f, f.z0.long(), SolverConfig())


@pytest.mark.parametrize(
    ("lanes", "options"),
    [
        (17, {}),
        (2, {"solver": "broyden"}),
        (2, {"damping": 0.5}),
        (2, {"scope": "batch"}),
        (2, {"ridge": 0.0}),
    ],
)
def test_all_else_is_solve_itself(lanes, options):
    f = Maps(lanes, 0.9)
    config = SolverConfig(**options)
    expected, found = solve(f, f.z0, config), solve_few(f, f.z0, config)
    assert torch.equal(found.state, expected.state)
    assert (found.nfe, found.total_lane_nfe) == (expected.nfe, expected.total_lane_nfe)


def test_lanes_that_depend_on_each_other_are_solve():
    matrix = torch.full((3, 3), 0.2, dtype=torch.float64)

    def f(z):
        return torch.tanh(torch.einsum("ts,bsc->btc", matrix, z) + 0.3)

    z0 = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(solve_few(f, z0, SolverConfig()).state, solve(f, z0, SolverConfig()).state)
    # As one unknown per sample, they are few lanes again.
    by_sample = SolverConfig(scope="sample", rtol=1e-9)
    torch.testing.assert_close(solve_few(f, z0, by_sample).state, solve(f, z0, by_sample).state)
