"""Every gradient against its definition, in float64."""

from __future__ import annotations

import pytest
import torch
from models.builders import build, tokens
from torch.utils.checkpoint import checkpoint

from fairseq_deq.implicit import GradientConfig, SolveStats, fixed_point, unroll
from fairseq_deq.solvers import SolverConfig

TIGHT = SolverConfig(solver="broyden", max_evals=300, rtol=1e-12, atol=0.0)
IFT = GradientConfig(mode="ift", solver=TIGHT)


def _problem():
    generator = torch.Generator().manual_seed(0)
    weight = 0.25 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    return weight.requires_grad_(), x.requires_grad_(), target


def _gradients(weight, x, target, gradient, solver=TIGHT):
    state = fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), solver, gradient).state
    return torch.autograd.grad((state * target).sum(), (weight, x))


def test_ift_is_the_gradient_of_a_dense_solve():
    weight, x, target = _problem()
    found = _gradients(weight, x, target, IFT)
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(500):
            z = torch.tanh(z @ weight.T + x)
        slope = 1 - z**2
        adjoint = torch.empty_like(z)
        for b in range(2):
            for t in range(4):
                jacobian = slope[b, t].unsqueeze(1) * weight
                adjoint[b, t] = torch.linalg.solve(torch.eye(5, dtype=z.dtype) - jacobian.T, target[b, t])
        x_grad = adjoint * slope
        weight_grad = torch.einsum("bti,btj->ij", x_grad, z)
    assert torch.allclose(found[0], weight_grad, atol=1e-10)
    assert torch.allclose(found[1], x_grad, atol=1e-10)


@pytest.mark.parametrize("wnorm", ["false", "true"])
@pytest.mark.parametrize("pre_norm", ["false", "true"])
def test_ift_through_the_model_is_the_gradient_of_a_long_unroll(pre_norm, wnorm):
    options = {"decoder_normalize_before": pre_norm, "wnorm": wnorm}
    source = tokens(2, 6)

    def gradients(**mode):
        model = build(**options, **mode)
        x, _ = model.extract_features(source)
        x.mul(torch.linspace(-1, 1, 16, dtype=x.dtype)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    implicit = gradients(f_eps=1e-12, b_eps=1e-12)
    unrolled = gradients(gradient="unroll", f_thres=150)
    assert implicit.keys() == unrolled.keys()
    for name, grad in unrolled.items():
        assert torch.allclose(implicit[name], grad, atol=1e-8 * (1 + grad.abs().max())), name


@pytest.mark.parametrize(
    ("mode", "steps", "damping"), [("phantom", 3, 0.7), ("phantom", 1, 1.0), ("jfb", 1, 1.0)]
)
def test_phantom_and_jfb_are_steps_at_the_fixed_point(mode, steps, damping):
    weight, x, target = _problem()
    found = _gradients(weight, x, target, GradientConfig(mode, steps=steps, damping=damping))
    star = fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), TIGHT, IFT).state.detach()
    last = unroll(lambda z: torch.tanh(z @ weight.T + x), star, steps, damping)
    expected = torch.autograd.grad((last * target).sum(), (weight, x))
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-10)


def test_the_active_set_does_not_change_the_gradient():
    def gradient(off):
        model = build(no_active_set=off)
        x, _ = model.extract_features(tokens(4, 16))
        x.mul(torch.linspace(-1, 1, 16, dtype=x.dtype)).sum().backward()
        return model.decoder.cell.ffn_in.weight_v.grad

    assert torch.allclose(gradient("false"), gradient("true"), atol=1e-9)


def test_tracking_follows_grad_mode_not_training():
    model = build().eval()
    x, _ = model.extract_features(tokens(1, 4))
    assert x.requires_grad
    with torch.no_grad():
        x, _ = model.train().extract_features(tokens(1, 4))
    assert not x.requires_grad


def test_two_forward_passes_and_one_backward_pass():
    weight, x, target = _problem()
    first = _gradients(weight, x, target, IFT)
    f = lambda z: torch.tanh(z @ weight.T + x)  # noqa: E731
    a = fixed_point(f, torch.zeros_like(x), TIGHT, IFT).state
    b = fixed_point(f, torch.zeros_like(x), TIGHT, IFT).state
    both = torch.autograd.grad(((a + b) * target).sum(), (weight, x))
    for one, two in zip(first, both):
        assert torch.allclose(2 * one, two, atol=1e-12)


def test_a_graph_can_be_used_twice():
    weight, x, target = _problem()
    state = fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), TIGHT, IFT).state
    loss = (state * target).sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused_in_words():
    weight, x, target = _problem()
    state = fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), TIGHT, IFT).state
    with pytest.raises(RuntimeError, match="use gradient mode unroll"):
        torch.autograd.grad((state * target).sum(), weight, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradient(reentrant):
    weight, x, target = _problem()
    expected = _gradients(weight, x, target, IFT)

    def layer(x):
        return fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), TIGHT, IFT).state

    weight.grad = x.grad = None
    (checkpoint(layer, x, use_reentrant=reentrant) * target).sum().backward()
    assert torch.allclose(weight.grad, expected[0], atol=1e-10)
    assert torch.allclose(x.grad, expected[1], atol=1e-10)


def test_autocast_keeps_the_solve_finite_and_converged():
    model = build(dtype=torch.float32, f_eps=2e-2, b_eps=2e-2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, extra = model.extract_features(tokens(2, 8))
    x.float().pow(2).sum().backward()
    assert extra["equilibria"][0].result.converged.float().mean() > 0.9
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


def test_statistics_of_both_solves_are_recorded():
    weight, x, target = _problem()
    forward, backward = SolveStats.empty(x.device), SolveStats.empty(x.device)
    f = lambda z: torch.tanh(z @ weight.T + x)  # noqa: E731
    state = fixed_point(f, torch.zeros_like(x), TIGHT, IFT, forward, backward).state
    assert forward.sums[0] == forward.sums[4] == 8
    assert backward.sums[0] == 0
    (state * target).sum().backward()
    assert backward.sums[0] == backward.sums[4] == 8
    assert backward.sums[3] / 8 < 1e-11


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "bptt"}, "gradient must be one of ift, phantom, jfb, unroll"),
        ({"steps": 0}, "at least 1 step"),
        ({"damping": 2.0}, "damping must lie in"),
    ],
)
def test_gradient_options_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GradientConfig(**options)
