"""Solves whose first evaluations are of a lower precision: what is found is what full precision finds."""

from __future__ import annotations

import pytest
import torch

from fairseq_deq.implicit import fixed_point
from fairseq_deq.solvers import SolverConfig, solve

WIDTH = 16


class Watched:
    """f(z) = tanh(z A + b) over (B, T, C), causal in T; it notes the precision of each evaluation."""

    def __init__(self, gain: float = 0.8) -> None:
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(WIDTH, WIDTH, generator=generator)
        self.matrix = (gain * matrix / torch.linalg.matrix_norm(matrix, 2)).requires_grad_()
        self.b = torch.randn(4, 6, WIDTH, generator=generator)
        self.z0 = torch.zeros_like(self.b)
        self.low: list[bool] = []

    def __call__(self, z):
        self.low.append(torch.is_autocast_enabled("cpu"))
        before = torch.nn.functional.pad(z, (0, 0, 1, 0))[:, :-1]
        return torch.tanh((z + 0.3 * before) @ self.matrix + self.b)


def test_the_last_evaluations_and_the_residual_are_of_full_precision():
    f = Watched()
    found = solve(f, f.z0, SolverConfig(rtol=1e-4, max_evals=60, early_precision="bfloat16"))
    low = f.low.index(False)
    assert low > 2
    assert f.low == [True] * low + [False] * (len(f.low) - low)
    assert found.nfe == len(f.low)
    full = Watched()
    expected = solve(full, full.z0, SolverConfig(rtol=1e-4, max_evals=60))
    assert not any(full.low)
    assert len(f.low) - low < expected.nfe  # which is what it is for
    assert bool(found.converged.all())
    residual = (f(found.state) - found.state).norm(dim=-1) / f(found.state).norm(dim=-1)
    torch.testing.assert_close(found.residual, residual.detach(), rtol=0.05, atol=1e-7)
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=2e-3)


def test_the_gradient_is_that_of_full_precision():
    grads = {}
    for precision, rtol in (("full", 1e-6), ("bfloat16", 1e-4)):
        f = Watched()
        config = SolverConfig(rtol=rtol, max_evals=80, early_precision=precision)
        fixed_point(f, f.z0, config).state.square().sum().backward()
        grads[precision] = f.matrix.grad
        assert any(f.low) == (precision != "full")
    error = (grads["bfloat16"] - grads["full"]).norm() / grads["full"].norm()
    assert float(error) < 1e-3


@pytest.mark.parametrize("budget", [1, 2, 7, 12])
def test_the_budget_is_that_of_both(budget):
    f = Watched(0.99)
    found = solve(f, f.z0, SolverConfig(rtol=1e-6, max_evals=budget, early_precision="bfloat16"))
    assert len(f.low) == found.nfe <= budget
    assert f.low[-1] is False
    assert sum(f.low) <= budget // 2


def test_a_trace_counts_on():
    f, seen = Watched(), []
    config = SolverConfig(max_evals=40, early_precision="bfloat16")
    found = solve(f, f.z0, config, trace=lambda done, _z: seen.append(done))
    assert seen == list(range(found.nfe))


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_for_the_first_evaluations_alone(fails):
    f, allowed, matmul = Watched(), [], torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def watched(z):
        allowed.append(matmul.fp32_precision == "tf32")
        if fails:
            raise ArithmeticError
        return f(z)

    config = SolverConfig(rtol=1e-5, max_evals=60, early_precision="tf32")
    if fails:
        with pytest.raises(ArithmeticError):
            solve(watched, f.z0, config)
    else:
        solve(watched, f.z0, config)
        assert (allowed[0], allowed[-1]) == (True, False)
        assert allowed.count(True) > 2
    assert matmul.fp32_precision == before


def test_where_nothing_is_to_be_saved_it_is_not_used():
    f = Watched()
    solve(f, f.z0, SolverConfig(rtol=0.05, early_precision="bfloat16"))  # looser than the first part
    solve(f, f.z0, SolverConfig(max_evals=1, early_precision="bfloat16"))
    assert not any(f.low)
    with torch.no_grad():
        f.matrix, f.b = f.matrix.double(), f.b.double()
    solve(f, f.z0.double(), SolverConfig(early_precision="bfloat16"))
    assert not any(f.low)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="early_precision must be one of full, tf32, bfloat16; got 'half'"):
        SolverConfig(early_precision="half")
    with pytest.raises(ValueError, match="early_precision must be full in scope recurrence"):
        SolverConfig(scope="recurrence", early_precision="tf32")
