"""The estimate of the inverse Jacobian that a solver leaves behind, lane by lane."""

from __future__ import annotations

import pytest
import torch
from problems import Pointwise

from fairseq_deq.solvers import SolverConfig, solve_keeping_inverse

B, T = 2, 12


class Lanes(Pointwise):
    """z -> A_t z + b_t, with a matrix of its own, of spectral norm `size`, for each lane (B, T)."""

    def __init__(self, width: int, sizes: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(B * T, width, width, generator=generator, dtype=torch.float64)
        self.matrix = sizes.view(-1, 1, 1) * matrix / torch.linalg.matrix_norm(matrix, 2).view(-1, 1, 1)
        self.shift = torch.randn(B * T, width, generator=generator, dtype=torch.float64)
        index = torch.arange(B * T, dtype=torch.float64).view(B, T, 1)
        super().__init__(self._at, index)

    def _at(self, z: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
        index = lanes.flatten().long()
        rows = torch.matmul(self.matrix[index], z.reshape(len(index), -1, 1)).squeeze(-1) + self.shift[index]
        return rows.view_as(z)

    def inverse_transpose(self, vector: torch.Tensor) -> torch.Tensor:
        system = torch.eye(vector.shape[-1]).double() - self.matrix.transpose(1, 2)
        return torch.linalg.solve(system, vector.flatten(0, 1)).view_as(vector)


def _vector(width: int) -> torch.Tensor:
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _estimate(solver: str, f: Lanes, width: int, active_set: str, **options):
    options = {"max_evals": 40, "rtol": 1e-10, "ridge": 0.0, "patience": 30} | options
    config = SolverConfig(solver, atol=0.0, active_set=active_set, **options)
    result, inverse = solve_keeping_inverse(f, torch.zeros(B, T, width, dtype=torch.float64), config)
    assert result.converged.all(), result.explain()
    return result, inverse(_vector(width))


@pytest.mark.parametrize("active_set", ["always", "never"])
def test_anderson_has_the_inverse_once_its_history_spans_the_space(active_set):
    f = Lanes(3, torch.full((B * T,), 0.9, dtype=torch.float64))
    _, estimate = _estimate("anderson", f, 3, active_set, memory=5)
    expected = f.inverse_transpose(_vector(3))
    assert (estimate - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - _vector(3)).norm() > 0.5 * expected.norm()  # the identity would not do


@pytest.mark.parametrize("active_set", ["always", "never"])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_lane_of_one_number_has_its_slope(solver, active_set):
    """One difference spans it."""
    f = Lanes(1, torch.tensor([-0.5, 0.9] * (B * T // 2), dtype=torch.float64))
    _, estimate = _estimate(solver, f, 1, active_set, memory=2 if solver == "anderson" else 0)
    assert torch.allclose(estimate, f.inverse_transpose(_vector(1)), rtol=1e-4)


@pytest.mark.parametrize("active_set", ["always", "never"])
@pytest.mark.parametrize(("solver", "memory"), [("anderson", 3), ("broyden", 0)])
def test_what_a_frozen_lane_knew_does_not_depend_on_who_moves_after_it(solver, memory, active_set):
    mixed = torch.tensor([0.05, 0.9] * (B * T // 2), dtype=torch.float64)
    alike = torch.full_like(mixed, 0.05)
    (result, among_slow), (_, among_fast) = (
        _estimate(solver, Lanes(3, sizes), 3, active_set, memory=memory, rtol=1e-3)
        for sizes in (mixed, alike)
    )
    fast = (mixed < 0.5).view(B, T)
    assert result.lane_nfe[fast].max() < result.lane_nfe[~fast].max()
    assert torch.allclose(among_slow[fast], among_fast[fast], rtol=1e-6)


def test_broydens_estimate_maps_the_newest_difference_to_the_newest_step():
    """With s the step, dg = g(z + s) - g(z), H for (I - J)^{-1}: v^T H (-dg) = v^T s for all v."""
    f = Lanes(4, torch.full((B * T,), 0.9, dtype=torch.float64))
    z0, seen = torch.zeros(B * T, 4, dtype=torch.float64), []

    def watched(z):
        fz = f._at(z, torch.arange(B * T))
        seen.append((z.clone(), fz - z))
        return fz

    config = SolverConfig("broyden", max_evals=6, rtol=1e-14, atol=0.0, scope="sample")
    _, inverse = solve_keeping_inverse(watched, z0, config)
    step, difference = (a - b for a, b in zip(seen[-1], seen[-2]))
    vector = torch.randn(B * T, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found, expected = (inverse(vector) * -difference).sum(-1), (vector * step).sum(-1)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_picard_and_linear_solvers_have_nothing_to_tell():
    f = Lanes(2, torch.full((B * T,), 0.5, dtype=torch.float64))
    _, estimate = _estimate("picard", f, 2, "never")
    assert torch.equal(estimate, _vector(2))
    with pytest.raises(ValueError, match="solver gmres keeps no estimate"):
        solve_keeping_inverse(f, torch.zeros(B, T, 2), SolverConfig("gmres", scope="sample"))
