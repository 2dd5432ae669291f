"""GMRES against dense solves: exactness, restarts, the budget, batch mates, and systems that are hopeless."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from problems import CASES

from fairseq_deq.solvers import SolverConfig, Status, linear_solver_names, register_linear_solver, solve

B, T, C = 3, 4, 3
N = T * C


class Coupled:
    """z -> J z + c with a dense matrix for each sample, over states (B, T, C)."""

    def __init__(self, matrix: torch.Tensor, constant: torch.Tensor) -> None:
        self.matrix, self.constant = matrix, constant
        self.calls = 0

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        flat = torch.matmul(self.matrix, z.flatten(1).unsqueeze(-1)).squeeze(-1)
        return flat.view_as(z) + self.constant

    @property
    def solution(self) -> torch.Tensor:
        system = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype) - self.matrix
        return torch.linalg.solve(system, self.constant.flatten(1)).view_as(self.constant)

    def sample(self, b: int) -> Coupled:
        return Coupled(self.matrix[b : b + 1], self.constant[b : b + 1])


def _coupled(size: float, dtype: torch.dtype = torch.float64) -> Coupled:
    """Matrices of spectral norm `size`: above 1 plain iteration may diverge."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(B, N, N, generator=generator, dtype=torch.float64)
    matrix = size * matrix / torch.linalg.matrix_norm(matrix, 2).view(-1, 1, 1)
    constant = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    return Coupled(matrix.to(dtype), constant.to(dtype))


def _config(**options) -> SolverConfig:
    return SolverConfig(
        "gmres", **({"scope": "sample", "max_evals": 60, "rtol": 1e-12, "atol": 0.0} | options)
    )


def _zeros(f: Coupled) -> torch.Tensor:
    return torch.zeros_like(f.constant)


@pytest.mark.parametrize("size", [0.5, 3.0])
@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_it_is_a_dense_solve(scope, size):
    f = _coupled(size)
    result = solve(f, _zeros(f), _config(scope=scope, memory=40))
    assert result.converged.all(), result.explain()
    assert result.status.shape == ({"sample": B, "batch": 1}[scope],)
    assert (result.state - f.solution).norm() <= 1e-10 * f.solution.norm()
    # N steps span the space of a sample, B*N that of the batch; one evaluation before, one after.
    assert result.nfe == f.calls <= {"sample": N, "batch": B * N}[scope] + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_keep_their_type_and_reach_what_they_can(dtype):
    f = _coupled(0.8, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    result = solve(f, _zeros(f), _config(rtol=tolerance))
    assert result.state.dtype == dtype
    assert result.converged.all(), result.explain()
    exact = _coupled(0.8).solution
    assert (result.state.double() - exact).norm() <= 20 * tolerance * exact.norm()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.stiffness != 1.0 and c.spoilt is None], ids=lambda c: c.name
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_it_solves_the_affine_maps_of_the_bank(case, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    result = solve(case.make(dtype), case.z0.to(dtype), _config(rtol=tolerance))
    assert result.converged.all(), result.explain()
    limit = case.stiffness * tolerance * case.solution.flatten(1).norm(dim=1)
    assert ((result.state.double() - case.solution).flatten(1).norm(dim=1) <= 2 * limit).all()


def test_a_nonzero_start_costs_one_evaluation_more_and_comes_to_the_same():
    f = _coupled(3.0)
    from_zero = solve(f, _zeros(f), _config())
    z0 = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = solve(f, z0, _config())
    assert result.converged.all()
    assert (result.state - f.solution).norm() <= 1e-10 * f.solution.norm()
    assert result.nfe == from_zero.nfe + 1
    there = solve(f, f.solution, _config(rtol=1e-9))
    assert there.converged.all()
    assert there.nfe == 1


@pytest.mark.parametrize("memory", [2, 5])
def test_restarts_with_a_small_memory_still_converge(memory):
    f = _coupled(0.9)
    result = solve(f, _zeros(f), _config(memory=memory, max_evals=300, rtol=1e-9))
    assert result.converged.all(), result.explain()
    assert result.nfe > N + 2
    assert (result.state - f.solution).norm() <= 1e-7 * f.solution.norm()


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_budget_is_kept_and_every_evaluation_counted(start):
    for budget in range(1, 16):
        f = _coupled(3.0)
        z0 = torch.full_like(f.constant, start)
        result = solve(f, z0, _config(max_evals=budget, memory=4))
        assert result.nfe == f.calls <= budget
        assert result.total_lane_nfe == f.calls * B * T
        assert ((result.lane_nfe >= 1) & (result.lane_nfe <= f.calls)).all()
        assert not result.converged.any()
        residual = (f(result.state) - result.state).flatten(1).norm(dim=1)
        size = f(result.state).flatten(1).norm(dim=1)
        assert torch.allclose(result.residual, residual / size, rtol=1e-6)
        assert (residual <= (1 + 1e-12) * (f(z0) - z0).flatten(1).norm(dim=1)).all()


def test_more_evaluations_never_make_it_worse():
    f = _coupled(3.0)
    distances = []
    for budget in range(3, N + 3):
        state = solve(f, _zeros(f), _config(max_evals=budget)).state
        distances.append((f(state) - state).flatten(1).norm(dim=1))
    assert all((b <= a * (1 + 1e-9)).all() for a, b in pairwise(distances))
    assert (distances[-1] < 1e-9).all()


def test_a_hopeless_system_has_stalled():
    # I - J is skew: one step from a residual r looks along (I - J) r, which is orthogonal to r.
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    f = Coupled((torch.eye(2).double() - skew).unsqueeze(0), torch.ones(1, 1, 2, dtype=torch.float64))
    result = solve(f, _zeros(f), _config(memory=1))
    assert result.status.tolist() == [Status.STALLED]
    assert result.nfe < 10
    assert solve(f, _zeros(f), _config(memory=2)).converged.all()
    # I - J is singular, and what it leaves out is asked for.
    singular = Coupled(torch.diag(torch.tensor([1.0, 0.5])).double().unsqueeze(0), f.constant)
    result = solve(singular, _zeros(f), _config())
    assert result.status.tolist() == [Status.STALLED]
    assert torch.isfinite(result.state).all()


@pytest.mark.parametrize("budget", [4, 9, 60])
@pytest.mark.parametrize("rtol", [1e-2, 1e-9])
def test_a_sample_is_the_same_alone_and_in_a_batch(budget, rtol):
    f = _coupled(3.0)
    f.matrix[1] *= 0.01  # done after a few steps, when the others are not
    together = solve(f, _zeros(f), _config(max_evals=budget, rtol=rtol))
    for b in range(B):
        alone = solve(f.sample(b), _zeros(f)[:1], _config(max_evals=budget, rtol=rtol))
        assert torch.allclose(alone.state[0], together.state[b], rtol=1e-6, atol=1e-9), b
        assert alone.status[0] == together.status[b]
        assert alone.lane_nfe[0] == together.lane_nfe[b]


def test_a_sample_that_is_not_finite_keeps_its_start_and_spoils_no_other():
    f = _coupled(0.5)
    clean = solve(f, _zeros(f), _config())
    f.constant[1] = float("nan")
    result = solve(f, _zeros(f), _config())
    assert result.status[1] == Status.NON_FINITE
    assert torch.equal(result.state[1], _zeros(f)[1])
    assert torch.allclose(result.state[[0, 2]], clean.state[[0, 2]], rtol=1e-9)
    assert result.converged[[0, 2]].all()


def test_positions_of_a_sample_share_one_krylov_space():
    f = _coupled(0.5)
    with pytest.raises(ValueError, match="gmres solves whole samples: scope must be one of sample, batch"):
        solve(f, _zeros(f), _config(scope="position"))


def test_a_linear_solver_can_be_added(monkeypatch):
    from fairseq_deq.solvers import registry

    monkeypatch.setattr(registry, "_LINEAR", dict(registry._LINEAR))
    gmres = registry.get_linear_solver("gmres")
    seen = []

    @register_linear_solver("mine")
    def mine(f, z0, config):
        seen.append(config.scope)
        return gmres(f, z0, config)

    assert linear_solver_names() == ("gmres", "mine")
    f = _coupled(0.5)
    result = solve(f, _zeros(f), SolverConfig("mine", scope="sample", rtol=1e-9, atol=0.0))
    assert result.converged.all()
    assert seen == ["sample"]
    for taken in ("mine", "anderson"):
        with pytest.raises(ValueError, match=f"solver '{taken}' is already registered"):
            register_linear_solver(taken)(mine)
