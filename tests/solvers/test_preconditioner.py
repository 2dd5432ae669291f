"""The preconditioner against dense inverses; what a good and a wrong one do to a solve."""

from __future__ import annotations

import math

import pytest
import torch
from problems import CausalMap, block_mean, expanding_neighbours
from selection import every_pair
from torch.nn.functional import pad

from fairseq_deq.solvers import Preconditioner, SolverConfig, solve

SOLVERS = ("anderson", "broyden", "picard")
DTYPES = [torch.float32, torch.float64]


def _matrix(width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Far from symmetric, with a spectral radius above 1."""
    generator = torch.Generator().manual_seed(seed)
    return 0.8 * torch.randn(width, width, generator=generator, dtype=torch.float64).to(dtype)


def _dense(p: Preconditioner) -> torch.Tensor:
    """The matrix of P, (C, C)."""
    return p(torch.eye(p.left.shape[0], dtype=p.left.dtype)).T


def _inverse(jacobian: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(torch.eye(len(jacobian), dtype=jacobian.dtype) - jacobian)


# ---------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("width", [1, 2, 5, 16, 33])
def test_full_rank_is_the_dense_inverse(width):
    jacobian = _matrix(width)
    for rank in (width, width + 7):
        assert torch.allclose(
            _dense(Preconditioner.from_jacobian(jacobian, rank)), _inverse(jacobian), rtol=1e-9
        )


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_low_rank_is_the_inverse_of_the_truncated_jacobian(rank):
    jacobian = _matrix(9)
    u, s, vh = torch.linalg.svd(jacobian)
    truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
    p = Preconditioner.from_jacobian(jacobian, rank)
    assert p.left.shape == p.right.shape == (9, rank)
    assert torch.allclose(_dense(p), _inverse(truncated), rtol=1e-9)


def test_a_jacobian_of_lower_rank_than_asked_for_is_inverted():
    jacobian = _matrix(6)[:, :1] @ _matrix(6, seed=1)[:1]
    assert torch.allclose(_dense(Preconditioner.from_jacobian(jacobian, 4)), _inverse(jacobian), atol=1e-9)


def test_transposed_and_cast():
    p = Preconditioner.from_jacobian(_matrix(8), 5)
    assert torch.allclose(_dense(p.transposed), _dense(p).T, atol=1e-12)
    assert not torch.allclose(_dense(p), _dense(p).T, atol=0.1)
    narrow = p.to(torch.zeros(1))
    assert narrow.left.dtype == narrow.right.dtype == torch.float32
    assert torch.allclose(_dense(narrow).double(), _dense(p), atol=1e-4)
    assert Preconditioner.from_jacobian(_matrix(8, dtype=torch.float32), 5).left.dtype == torch.float32


@pytest.mark.parametrize("rank", [4, 9])
def test_the_leading_block_where_the_others_do_not_act_on_it(rank):
    """J = [[A, 0], [B, 0]], so (I - J)^{-1} has (I - A)^{-1} in front."""
    jacobian = torch.zeros(9, 9, dtype=torch.float64)
    jacobian[:, :4] = _matrix(9)[:, :4]
    leading = Preconditioner.from_jacobian(jacobian, rank).leading(4)
    assert leading.left.shape[0] == leading.right.shape[0] == 4
    assert torch.allclose(_dense(leading), _inverse(jacobian[:4, :4]), rtol=1e-9)


@pytest.mark.parametrize("rank", [0, 3, 5])
@pytest.mark.parametrize(
    "jacobian",
    [
        torch.zeros(5, 5),
        torch.full((5, 5), math.nan),
        torch.diag(torch.tensor([0.5, math.inf, 0.0, 0.0, 0.0])),
        torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0])),
    ],
    ids=["zero", "NaN", "inf", "eigenvalue 1"],
)
def test_a_jacobian_without_an_inverse_gives_the_identity(jacobian, rank):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Preconditioner.from_jacobian(jacobian, rank)(rows), rows)


def test_rank_0_is_the_identity():
    rows = torch.ones(3, 5, dtype=torch.float64)
    assert torch.equal(Preconditioner.from_jacobian(_matrix(5), 0)(rows), rows)


# ---------------------------------------------------------------------- its rows


def test_lanes_of_several_positions_are_preconditioned_position_by_position():
    p, rows = Preconditioner.from_jacobian(_matrix(6), 4), _matrix(18, seed=3)
    expected = rows.view(54, 6) @ _dense(p).T
    assert torch.allclose(p(rows), expected.view(18, 18), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 12, 33])
def test_a_row_rounds_the_same_in_any_company(width, dtype):
    p = Preconditioner.from_jacobian(_matrix(width), 5).to(torch.zeros(1, dtype=dtype))
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    whole = p(rows)
    for index in ([0], [49], [3, 17, 18], list(range(1, 34))):
        assert torch.equal(p(rows[index]), whole[index])


def test_nothing_is_changed_in_place():
    p, rows = Preconditioner.from_jacobian(_matrix(4), 4), _matrix(4, seed=5)
    before = rows.clone()
    p(rows)
    assert torch.equal(rows, before)


# ---------------------------------------------------------------------- a good one


@pytest.mark.parametrize("scope", ["position", "sample"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_good_one_solves_what_expands_in_fewer_evaluations_than_plain_has_budget_for(solver, scope):
    f = expanding_neighbours()
    z0 = torch.zeros_like(f.u)
    p = Preconditioner.from_jacobian(block_mean(f, z0), 8)
    config = SolverConfig(solver, max_evals=30, rtol=1e-6, atol=0.0, scope=scope)
    plain = solve(f, z0, config)
    assert plain.converged.float().mean() < 0.5
    f.evaluations = 0
    found = solve(f, z0, config, p)
    assert found.converged.all(), found.explain()
    assert found.nfe == f.evaluations <= {"position": 16, "sample": 12}[scope]
    assert torch.allclose(f(found.state), found.state, atol=1e-5 * float(found.state.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_exact_one_takes_newtons_step_on_an_affine_map(solver):
    matrix = _matrix(5)
    p = Preconditioner.from_jacobian(matrix, 5)
    config = SolverConfig(solver, max_evals=10, rtol=1e-9, atol=0.0)
    result = solve(lambda z: z @ matrix.T + 1.0, torch.zeros(4, 1, 5, dtype=torch.float64), config, p)
    assert result.converged.all()
    assert result.nfe == 2


def test_damping_shortens_the_preconditioned_step():
    matrix, seen = _matrix(3), []
    p = Preconditioner.from_jacobian(matrix, 3)

    def f(z):
        seen.append(z.clone())
        return z @ matrix.T + 1.0

    z0 = torch.zeros(1, 1, 3, dtype=torch.float64)
    for solver in SOLVERS:
        seen.clear()
        solve(f, z0, SolverConfig(solver, max_evals=2, damping=0.25, rtol=1e-12), p)
        assert torch.allclose(seen[1], 0.25 * p(torch.ones(1, 3, dtype=torch.float64)).view(1, 1, 3))


# ---------------------------------------------------------------------- a wrong one

C = 6


def _wrong(kind: str, dtype: torch.dtype) -> Preconditioner:
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(C, 3, generator=generator, dtype=torch.float64) / C**0.5 for _ in range(2))
    if kind == "random":
        left = left / torch.linalg.matrix_norm(left @ right.T, 2)
    elif kind == "one huge entry":
        left = pad(torch.full((1, 1), 1e12, dtype=torch.float64), (0, 2, 0, C - 1))
    elif kind == "minus":  # every step in the wrong direction
        left, right = -3.0 * torch.eye(C).double(), torch.eye(C).double()
    else:
        left = left * float(kind)
    return Preconditioner(left.to(dtype), right.to(dtype))


WRONG = ["random", "minus", "1e6", "1e30", "one huge entry", "nan", "inf"]


def _causal(dtype: torch.dtype, gain: float, batch: int = 3) -> CausalMap:
    generator = torch.Generator().manual_seed(0)
    return CausalMap(torch.randn(batch, 20, C, generator=generator, dtype=torch.float64).to(dtype), gain)


@every_pair(solver=SOLVERS, kind=WRONG, dtype=DTYPES, active_set=("always", "never"))
def test_a_wrong_one_costs_evaluations_and_never_the_result(solver, kind, dtype, active_set):
    f = _causal(dtype, 0.7)
    z0, rtol = torch.zeros_like(f.b), 1e-4 if dtype == torch.float32 else 1e-8
    config = SolverConfig(solver, max_evals=300, rtol=rtol, atol=0.0, active_set=active_set)
    plain, found = solve(f, z0, config), solve(f, z0, config, _wrong(kind, dtype))
    assert plain.converged.all()
    assert found.converged.all(), found.explain()
    assert torch.isfinite(found.state).all()
    assert found.nfe <= 3 * plain.nfe + 30
    assert torch.allclose(found.state, plain.state, rtol=0, atol=50 * rtol)


@every_pair(solver=SOLVERS, kind=WRONG, dtype=DTYPES)
def test_a_wrong_one_keeps_causality_and_batch_invariance_at_every_budget(solver, kind, dtype, thorough):
    f, p = _causal(dtype, 1.4), _wrong(kind, dtype)
    z0 = torch.zeros_like(f.b)
    # Every budget in one precision, and in the slow cases; some of them in the others.
    for budget in range(1, 21) if dtype == torch.float32 or thorough else (1, 2, 3, 6, 13, 20):
        config = SolverConfig(solver, max_evals=budget, rtol=1e-4, atol=0.0, active_set="always")
        before, t = solve(f, z0, config, p), (7 * budget) % 20
        changed = f.b.clone()
        changed[:, t] += 1.0
        after = solve(CausalMap(changed, 1.4), z0, config, p)
        alone = solve(CausalMap(f.b[1:2], 1.4), z0[:1], config, p)
        assert torch.isfinite(before.state).all(), budget
        assert before.nfe <= budget
        assert torch.equal(after.state[:, :t], before.state[:, :t]), budget
        assert torch.equal(after.status[:, :t], before.status[:, :t]), budget
        for name in ("state", "status", "lane_nfe", "residual"):
            assert torch.equal(getattr(alone, name)[0], getattr(before, name)[1]), (budget, name)


@pytest.mark.parametrize("solver", SOLVERS)
def test_independent_lanes_survive_a_wrong_one_too(solver):
    f = _causal(torch.float64, 0.7, batch=8)
    f.b = f.b[:, :1]
    z0 = torch.zeros_like(f.b)
    config = SolverConfig(solver, max_evals=200, rtol=1e-8, atol=0.0)
    plain = solve(f, z0, config)
    for kind in WRONG:
        found = solve(f, z0, config, _wrong(kind, torch.float64))
        assert found.converged.all(), kind
        assert torch.allclose(found.state, plain.state, atol=1e-6), kind
        assert found.nfe <= 6 * plain.nfe, kind
