"""With a preconditioner every gradient is what it was: against dense solves and long unrolls, in float64."""

from __future__ import annotations

import pytest
import torch
from problems import Neighbours, block_mean, expanding_neighbours

from fairseq_deq.implicit import GradientConfig, fixed_point, unroll
from fairseq_deq.solvers import Preconditioner, SolverConfig, solve, solve_keeping_inverse

SOLVERS = ("anderson", "broyden", "picard")
SCOPES = ("position", "sample")


def _tight(solver: str, scope: str = "position", **options) -> SolverConfig:
    options = {"max_evals": 200, "rtol": 1e-11, "patience": 30} | options
    return SolverConfig(solver, scope=scope, atol=0.0, **options)


def _leaves(f: Neighbours) -> list[torch.Tensor]:
    """What has a gradient: the input and both matrices, which become new leaves."""
    f.u, f.own, f.before = (x.detach().clone().requires_grad_() for x in (f.u, f.own, f.before))
    return [f.u, f.own, f.before]


def _weights(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(9), dtype=like.dtype)


def _contracting(batch: int = 2, length: int = 4, width: int = 5) -> Neighbours:
    f = expanding_neighbours(width=16, batch=batch, length=length)
    f.u, f.own, f.before = (x[..., :width].contiguous() for x in (f.u, f.own[:width], f.before[:width]))
    f.own = 0.4 * f.own / torch.linalg.matrix_norm(f.own, 2)
    return f


def _dense(f: Neighbours, state: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradient by the implicit function theorem and one dense solve."""
    leaves = _leaves(f)
    jacobian = torch.autograd.functional.jacobian(f, state).reshape(state.numel(), state.numel())
    identity = torch.eye(state.numel(), dtype=state.dtype)
    adjoint = torch.linalg.solve(identity - jacobian.T, weights.flatten()).view_as(state)
    return torch.autograd.grad(f(state), leaves, adjoint)


def _check(found, expected, tolerance: float = 1e-8) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * (1e-12 + b.norm())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backward", SOLVERS)
@pytest.mark.parametrize("forward", SOLVERS)
def test_of_a_layer_that_expands_it_is_the_dense_solve(forward, backward, scope):
    """Plain iteration solves neither pass: P forwards, and P^T backwards, make it contract."""
    f = expanding_neighbours(batch=2, length=5)
    z0 = torch.zeros_like(f.u)
    p = Preconditioner.from_jacobian(block_mean(f, z0), 8)
    assert not torch.allclose(p.left @ p.right.T, p.right @ p.left.T, atol=0.05)  # P is not P^T
    assert not solve(f, z0, _tight("picard", scope)).converged.any()
    leaves, weights = _leaves(f), _weights(z0)
    gradient = GradientConfig(solver=_tight(backward, scope))
    equilibrium = fixed_point(f, z0, _tight(forward, scope), gradient, preconditioner=p)
    found = torch.autograd.grad((equilibrium.state * weights).sum(), leaves)
    for stats in (equilibrium.forward, equilibrium.backward):
        lanes, evaluations, *_, converged, _ = stats.sums.tolist()
        assert converged == lanes > 0
        assert evaluations / lanes <= 45
    _check(found, _dense(f, equilibrium.state.detach(), weights))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_of_a_layer_that_contracts_it_is_the_long_unroll(solver, scope):
    f = _contracting()
    z0, leaves = torch.zeros_like(f.u), _leaves(f)
    weights = _weights(z0)
    last = unroll(f, z0, 200)
    expected = torch.autograd.grad((last * weights).sum(), leaves)
    for seed in (0, 1):  # whatever P is
        generator = torch.Generator().manual_seed(seed)
        left, right = (0.3 * torch.randn(5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        tight = _tight(solver, scope)
        equilibrium = fixed_point(
            f, z0, tight, GradientConfig(solver=tight), preconditioner=Preconditioner(left, right)
        )
        _check(torch.autograd.grad((equilibrium.state * weights).sum(), leaves), expected)


@pytest.mark.parametrize("mode", ["ift", "shine", "phantom", "jfb", "unroll"])
def test_every_mode_takes_a_preconditioner_and_only_the_path_changes(mode):
    f = _contracting()
    z0, leaves = torch.zeros_like(f.u), _leaves(f)
    weights, tight = _weights(z0), _tight("broyden", max_evals=60)
    gradient = GradientConfig(mode, tight, refine=60)
    p = Preconditioner.from_jacobian(block_mean(f, z0), 5)
    plain, found = (
        torch.autograd.grad(
            (fixed_point(f, z0, tight, gradient, preconditioner=known).state * weights).sum(), leaves
        )
        for known in (None, p)
    )
    _check(found, plain)


@pytest.mark.parametrize("kind", ["nan", "inf", "1e30", "-5"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_wrong_one_does_not_change_the_gradient(solver, kind):
    f = _contracting()
    z0, leaves = torch.zeros_like(f.u), _leaves(f)
    weights, tight = _weights(z0), _tight(solver, max_evals=400, patience=6)
    p = Preconditioner(torch.full((5, 1), float(kind)).double(), torch.ones(5, 1).double())
    equilibrium = fixed_point(f, z0, tight, GradientConfig(solver=tight), preconditioner=p)
    found = torch.autograd.grad((equilibrium.state * weights).sum(), leaves)
    assert equilibrium.backward.sums[4] == equilibrium.backward.sums[0] == 8
    _check(found, _dense(f, equilibrium.state.detach(), weights), 1e-7)


# ---------------------------------------------------------------------- the estimate that a solver leaves


def _affine(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    matrix = 0.6 * matrix / torch.linalg.matrix_norm(matrix, 2)
    return matrix, torch.randn(2, 6, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
def test_shine_with_an_exact_one_is_exact_without_refinement(solver):
    matrix, x = _affine(4)
    x.requires_grad_()
    p = Preconditioner.from_jacobian(matrix, 4)
    weights = _weights(x)
    gradient = GradientConfig("shine", _tight("anderson"), refine=0)
    state = fixed_point(
        lambda z: z @ matrix.T + x, torch.zeros(x.shape).double(), _tight(solver), gradient, preconditioner=p
    ).state
    (found,) = torch.autograd.grad((state * weights).sum(), x)
    expected = weights @ torch.linalg.inv(torch.eye(4).double() - matrix)
    assert torch.allclose(found, expected, rtol=1e-7)
    assert not torch.allclose(expected, weights, rtol=0.2)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_what_a_solver_adds_to_the_estimate_of_any_other(solver):
    """A history that spans the space has the inverse, whatever P it was made with."""
    matrix, x = _affine(2)
    generator = torch.Generator().manual_seed(5)
    left, right = (0.3 * torch.randn(2, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    p, vector = Preconditioner(left, right), _weights(x)
    config = _tight(solver, ridge=0.0, memory=3 if solver == "anderson" else 0, rtol=1e-9)
    result, inverse = solve_keeping_inverse(lambda z: z @ matrix.T + x, torch.zeros_like(x), config, p)
    assert result.converged.all()
    expected = vector @ torch.linalg.inv(torch.eye(2).double() - matrix)
    bare = p.transposed(vector.flatten(0, 1)).view_as(vector)
    error = (inverse(vector) - expected).norm()
    assert error < 0.7 * (bare - expected).norm()
    if solver == "anderson":
        assert error < 1e-4 * expected.norm()


def test_without_a_history_the_estimate_is_the_preconditioner():
    matrix, x = _affine(3)
    p, vector = Preconditioner.from_jacobian(matrix, 2), _weights(x)
    _, inverse = solve_keeping_inverse(lambda z: z @ matrix.T + x, torch.zeros_like(x), _tight("picard"), p)
    assert torch.allclose(inverse(vector), p.transposed(vector.flatten(0, 1)).view_as(vector))
