"""The contracts of a solve, for every solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import CausalMap, expanding, solvable
from selection import every_pair

from fairseq_deq.solvers import (
    ConvergenceError,
    ConvergenceWarning,
    SolverConfig,
    Status,
    register_solver,
    registry,
    solve,
    solver_names,
)

SOLVERS = ("anderson", "broyden", "picard")
NAMES = [problem.name for problem in solvable(torch.float32)]


def _config(solver: str, **options) -> SolverConfig:
    return SolverConfig(solver=solver, **({"max_evals": 400, "patience": 100} | options))


@every_pair(
    solver=["anderson", "broyden"],
    index={name: index for index, name in enumerate(NAMES)},
    scope=["position", "sample", "batch"],
    dtype=[torch.float32, torch.float64],
)
def test_known_fixed_points_are_found(solver, index, scope, dtype):
    problem = solvable(dtype)[index]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    result = solve(problem.f, problem.z0, _config(solver, rtol=tolerance, atol=0.0, scope=scope, memory=8))
    assert result.converged.all(), result.explain()
    # The condition of the flattest problem, 1/(1 - 0.999), stands between residual and error.
    assert torch.allclose(result.state, problem.solution, rtol=2e3 * tolerance, atol=2e3 * tolerance)
    assert result.state.dtype == dtype


@pytest.mark.parametrize("index", [0, 1, 2, 4], ids=[NAMES[i] for i in (0, 1, 2, 4)])
def test_picard_finds_them_where_it_contracts(index):
    problem = solvable(torch.float64)[index]
    result = solve(problem.f, problem.z0, _config("picard", rtol=1e-8, atol=0.0))
    assert result.converged.all()
    assert torch.allclose(result.state, problem.solution, atol=1e-6)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_accelerated_solvers_do_not_need_a_contraction(solver):
    problem = expanding(torch.float64)
    result = solve(problem.f, problem.z0, _config(solver, rtol=1e-9, atol=0.0))
    assert result.converged.all()
    assert torch.allclose(result.state, problem.solution, atol=1e-7)


def test_a_divergent_map_is_called_that_and_stays_finite():
    result = solve(lambda z: 3.0 * z + 1.0, torch.ones(2, 3, 4), _config("picard", max_evals=30))
    assert not result.converged.any()
    assert torch.isfinite(result.state).all()
    assert set(result.status.flatten().tolist()) <= {Status.STALLED, Status.DIVERGED, Status.MAX_ITER}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_without_a_fixed_point_does_not_converge(solver):
    result = solve(
        lambda z: z + 1.0, torch.zeros(1, 2, 3), _config(solver, max_evals=40, rtol=0.0, atol=1e-3)
    )
    assert not result.converged.any()
    assert torch.isfinite(result.state).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_nan_sample_keeps_its_start_and_spoils_no_other(solver):
    problem = solvable(torch.float64)[0]

    def f(z):
        poison = torch.zeros_like(z)
        poison[0] = float("nan")
        return problem.f(z) + poison

    config = _config(solver, rtol=1e-8, atol=0.0, max_evals=60)
    result = solve(f, problem.z0, config)
    clean = solve(problem.f, problem.z0, config)
    assert torch.equal(result.state[0], problem.z0[0])
    assert (result.status[0] == Status.NON_FINITE).all()
    assert torch.equal(result.state[1], clean.state[1])


def test_a_lane_that_overflows_late_keeps_its_best_state():
    def f(z):
        return torch.where(z < 3.0, z + 1.0, torch.full_like(z, float("inf")))

    result = solve(f, torch.zeros(1, 1, 2), _config("picard", max_evals=12))
    assert torch.isfinite(result.state).all()
    assert not result.converged.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_step_goes_to_f_of_the_start(solver):
    seen = []

    def f(z):
        seen.append(z.clone())
        return torch.cos(z) + 1.0

    solve(f, torch.zeros(1, 2, 3), _config(solver, max_evals=2))
    assert torch.equal(seen[1], torch.full((1, 2, 3), 2.0))


def test_one_evaluation_gives_f_of_the_start():
    z0 = torch.randn(1, 2, 3)
    result = solve(torch.cos, z0, _config("picard", max_evals=1))
    assert torch.equal(result.state, torch.cos(z0))
    assert result.nfe == 1


@pytest.mark.parametrize(("atol", "rtol"), [(1e-3, 0.0), (0.0, 1e-3), (1e-4, 1e-4)])
def test_the_tolerance_is_a_mean_square_plus_a_share_of_the_size(atol, rtol):
    fz = torch.tensor([[[3.0, 4.0]]])
    limit = atol * 2**0.5 + rtol * 5.0
    for distance, converged in ((0.99 * limit, True), (1.01 * limit, False)):
        z0 = fz - torch.tensor([distance, 0.0])
        result = solve(
            lambda z: fz.expand_as(z), z0, SolverConfig("picard", max_evals=1, atol=atol, rtol=rtol)
        )
        assert bool(result.converged.all()) == converged


# ---------------------------------------------------------------------- lanes


def _causal(batch=3, length=24, dtype=torch.float64, seed=0):
    b = torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return CausalMap(b), torch.zeros_like(b)


@every_pair(solver=SOLVERS, budget=[1, 2, 3, 4, 5, 7, 9, 12, 20, 60], active_set=["always", "auto", "never"])
def test_causality_at_every_budget(solver, budget, active_set):
    config = SolverConfig(solver=solver, max_evals=budget, rtol=1e-4, active_set=active_set)
    f, z0 = _causal()
    before = solve(f, z0, config)
    for t in (5, 17, 23):
        changed = f.b.clone()
        changed[:, t] += 1.0
        after = solve(CausalMap(changed), z0, config)
        assert torch.equal(after.state[:, :t], before.state[:, :t])
        assert torch.equal(after.status[:, :t], before.status[:, :t]) or budget < 60


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("budget", [3, 8, 60])
def test_a_sample_is_the_same_alone_and_in_a_batch(solver, budget):
    config = SolverConfig(solver=solver, max_evals=budget, rtol=1e-4)
    f, z0 = _causal(batch=4)
    together = solve(f, z0, config)
    for row in range(4):
        alone = solve(CausalMap(f.b[row : row + 1]), z0[:1], config)
        assert torch.equal(alone.state[0], together.state[row])
        assert torch.equal(alone.lane_nfe[0], together.lane_nfe[row])


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_the_active_set_saves_work_and_changes_nothing(solver):
    config = SolverConfig(solver=solver, max_evals=80, rtol=1e-5, active_set="always")
    f, z0 = _causal(batch=4, length=32)
    on = solve(f, z0, config)
    counted = f.rows
    f.rows = 0
    off = solve(f, z0, SolverConfig(solver=solver, max_evals=80, rtol=1e-5, active_set="never"))
    assert torch.equal(on.state, off.state)
    assert on.total_lane_nfe == counted
    assert off.total_lane_nfe == f.rows == off.nfe * 128
    assert on.total_lane_nfe < 0.9 * off.total_lane_nfe


def test_converged_means_converged_with_every_lane_at_its_final_state():
    f, z0 = _causal(length=32)
    result = solve(f, z0, SolverConfig(max_evals=200, rtol=1e-6, atol=0.0))
    assert result.converged.all()
    fz = f(result.state)
    residual = (fz - result.state).norm(dim=-1) / fz.norm(dim=-1)
    assert residual.max() <= 1.1e-6
    assert torch.allclose(residual, result.residual, rtol=1e-3, atol=1e-9)


def test_evaluations_stay_within_the_budget():
    f, z0 = _causal()
    for budget in (1, 2, 5, 11):
        assert solve(f, z0, SolverConfig(max_evals=budget, rtol=1e-12)).nfe <= budget


def test_the_solvers_memory_does_not_grow_with_the_budget():
    from fairseq_deq.solvers.anderson import Anderson
    from fairseq_deq.solvers.broyden import Broyden

    like = torch.zeros(8, 4)
    for cls, memory in ((Anderson, 3), (Broyden, 5)):
        sizes = []
        for steps in (20, 200):
            method = cls(SolverConfig(solver=cls.__name__.lower(), memory=memory), like, np.ones(8))
            z = torch.zeros_like(like)
            for _ in range(steps):
                g = torch.cos(z) - z
                products = [p.numpy().astype(float) for p in method.observe(z, g, None, lambda rows: rows)]
                z = method.step(np.stack(products) if products else [], z, g, None, lambda rows: rows)
            held = [t for v in vars(method).values() for t in (v if isinstance(v, list) else [v])]
            sizes.append(
                sum(t.size if isinstance(t, np.ndarray) else t.numel() for t in held if hasattr(t, "shape"))
            )
        assert sizes[0] == sizes[1]


# ---------------------------------------------------------------------- policies and options


def test_policy_raise_says_why():
    with pytest.raises(ConvergenceError, match="6 of 6 lanes"):
        solve(lambda z: z + 1.0, torch.zeros(2, 3, 1), SolverConfig(max_evals=5, policy="raise"))


def test_policy_fallback_saves_what_the_first_solver_could_not(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @register_solver("wrong_way")
    class WrongWay:
        default_memory = 1

        def __init__(self, config, like, books):
            pass

        def observe(self, z, g, restarted, precondition):
            return []

        def step(self, products, z, g, tau, precondition):
            return z - g

        def skip(self):
            pass

        def subset(self, source):
            return self

    problem = solvable(torch.float64)[0]
    options = {"max_evals": 200, "rtol": 1e-6, "atol": 0.0}
    assert "wrong_way" in solver_names()
    assert not solve(problem.f, problem.z0, SolverConfig("wrong_way", **options)).converged.any()
    with pytest.warns(ConvergenceWarning, match="trying damped picard"):
        result = solve(problem.f, problem.z0, SolverConfig("wrong_way", policy="fallback", **options))
    assert result.converged.all()
    assert torch.allclose(result.state, problem.solution, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"toll": 1e-6}, "unknown solver option toll; valid options: solver, max_evals"),
        ({"solver": "newton"}, "solver must be one of anderson, broyden, picard, gmres"),
        ({"scope": "token"}, "scope must be one of position, sample, batch"),
        ({"policy": "ignore"}, "policy must be one of best, raise, fallback"),
        ({"max_evals": 0}, "max_evals must be an integer of at least 1"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"rtol": -1.0}, "rtol must be at least 0"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\]"),
        ({"solver": "anderson", "memory": 1}, "anderson needs memory >= 2"),
    ],
)
def test_options_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SolverConfig.from_options(options)


def test_every_status_explains_itself():
    for status in Status:
        assert status.sentence.endswith(".")
