"""Every gradient mode, with every solver, in every company that training puts it in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models.builders import build, tokens
from problems import rowwise
from torch.utils.checkpoint import checkpoint

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.solvers import SolverConfig, solver_names

MODES = ["ift", "shine", "phantom", "jfb", "unroll"]


def _solver(name: str = "anderson", **options) -> SolverConfig:
    return SolverConfig(name, **({"max_evals": 60, "rtol": 1e-11, "atol": 0.0} | options))


def _problem(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    weight = (0.25 * torch.randn(5, 5, generator=generator, dtype=torch.float64)).to(dtype)
    x, target = (torch.randn(2, 4, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return weight.requires_grad_(), x.requires_grad_(), target


def _layer(weight, x, gradient, solver=None, product=F.linear):
    z0 = torch.zeros(x.shape, dtype=x.dtype)
    return fixed_point(lambda z: torch.tanh(product(z, weight) + x), z0, solver or _solver(), gradient)


def _gradients(gradient, solver=None, dtype=torch.float64):
    weight, x, target = _problem(dtype)
    state = _layer(weight, x, gradient, solver).state
    return torch.autograd.grad((state * target).sum(), (weight, x))


def _exact():
    return _gradients(GradientConfig("ift", _solver("broyden", max_evals=300, rtol=1e-13)))


# ---------------------------------------------------------------------- shine


@pytest.mark.parametrize("backward", ["anderson", "broyden", "picard", "gmres"])
@pytest.mark.parametrize("forward", sorted(solver_names()))
def test_shine_refined_to_the_end_is_ift(forward, backward):
    gradient = GradientConfig("shine", _solver(backward), refine=200)
    for found, exact in zip(_gradients(gradient, _solver(forward, max_evals=200)), _exact()):
        assert torch.allclose(found, exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("forward", sorted(solver_names()))
def test_shine_takes_the_estimate_as_it_is_or_refines_it_and_says_what_that_took(forward):
    errors = []
    for refine in (0, 3, 12):
        weight, x, target = _problem()
        gradient = GradientConfig("shine", _solver(), refine=refine)
        equilibrium = _layer(weight, x, gradient, _solver(forward, max_evals=200, rtol=1e-6))
        found = torch.autograd.grad((equilibrium.state * target).sum(), (weight, x))
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, _exact())))
        lanes, evaluations = equilibrium.backward.sums[:2].tolist()
        assert equilibrium.forward.sums[0] == 8
        assert (lanes, evaluations) == ((8, 8 * refine) if refine else (0, 0))
    assert errors[0] < 1.0
    assert errors[2] < 1e-3 < errors[0]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("forward", ["anderson", "broyden"])
def test_the_estimate_of_a_solver_is_better_than_none(forward):
    def error(solver):
        found = _gradients(GradientConfig("shine", _solver(), refine=0), _solver(solver, rtol=1e-7, memory=0))
        return float((found[1] - _exact()[1]).norm())

    assert error(forward) < error("picard")  # whose estimate is the identity


# ---------------------------------------------------------------------- GMRES backward


@pytest.mark.parametrize("scope", ["position", "sample", "batch"])
def test_ift_with_gmres_is_exact(scope):
    gradient = GradientConfig("ift", _solver("gmres", scope=scope, memory=60))
    for found, exact in zip(_gradients(gradient, _solver(scope=scope, max_evals=200)), _exact()):
        assert torch.allclose(found, exact, rtol=1e-8, atol=1e-9)


def test_gmres_through_the_model_is_what_the_other_solvers_find():
    def gradients(**options):
        model = build(**options)
        x, extra = model.extract_features(tokens(2, 6))
        x.mul(torch.linspace(-1, 1, 16, dtype=x.dtype)).sum().backward()
        assert extra["backward_stats"].sums[0] > 0
        assert extra["backward_stats"].sums[4] == extra["backward_stats"].sums[0]
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(b_solver="gmres", b_memory=100), gradients()
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=1e-7 * (1 + grad.abs().max())), name


# ---------------------------------------------------------------------- in company


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_used_twice_gets_the_sum(mode):
    gradient = GradientConfig(mode, _solver())
    once = _gradients(gradient)
    weight, x, target = _problem()
    loss = sum((_layer(weight, x, gradient).state * factor * target).sum() for factor in (1, 2))
    for one, both in zip(once, torch.autograd.grad(loss, (weight, x))):
        assert torch.allclose(3 * one, both, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up(mode):
    # What a history says of the inverse makes much of a rounding error: f must round a row the same alone.
    gradient, (weight, x, target) = GradientConfig(mode, _solver()), _problem()
    state = _layer(weight, x, gradient, product=rowwise).state
    once = torch.autograd.grad((state * target).sum(), (weight, x))
    for row in range(2):
        part = _layer(weight, x[row : row + 1], gradient, product=rowwise).state
        (part * target[row : row + 1]).sum().backward()
    assert torch.allclose(weight.grad, once[0], rtol=1e-8, atol=1e-10)
    assert torch.allclose(x.grad, once[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_nothing(mode, reentrant):
    gradient = GradientConfig(mode, _solver())
    once = _gradients(gradient)
    weight, x, target = _problem()
    state = checkpoint(lambda x: _layer(weight, x, gradient).state, x, use_reentrant=reentrant)
    (state * target).sum().backward()
    assert torch.allclose(weight.grad, once[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(x.grad, once[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_keeps_the_gradient_to_its_precision(mode, half):
    gradient, solver = GradientConfig(mode, _solver(rtol=1e-3)), _solver(rtol=1e-3, max_evals=20)
    plain = _gradients(gradient, solver, torch.float32)
    with torch.autocast("cpu", dtype=half):
        weight, x, target = _problem(torch.float32)
        state = _layer(weight, x, gradient, solver).state
        loss = (state.float() * target).sum()
    for found, exact in zip(torch.autograd.grad(loss, (weight, x)), plain):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.05 * exact.norm()
