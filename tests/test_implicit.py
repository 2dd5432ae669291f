"""Every gradient against its definition, in float64."""

from __future__ import annotations

import pytest
import torch
from models.builders import build, tokens
from torch.utils.checkpoint import checkpoint

from fairseq_deq.implicit import GradientConfig, SolveStats, fixed_point, unroll
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.weight_norm import Initializer
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
    def gradient(active_set):
        model = build(active_set=active_set)
        x, _ = model.extract_features(tokens(4, 16))
        x.mul(torch.linspace(-1, 1, 16, dtype=x.dtype)).sum().backward()
        return model.decoder.layer.ffn_in.weight_v.grad

    assert torch.allclose(gradient("always"), gradient("never"), atol=1e-9)


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
        ({"mode": "bptt"}, "gradient must be one of ift, shine, phantom, jfb, unroll"),
        ({"steps": 0}, "at least 1 step"),
        ({"damping": 2.0}, "damping must lie in"),
    ],
)
def test_gradient_options_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GradientConfig(**options)


# ---------------------------------------------------------------------- through the layer itself


def _layer(weight_norm: bool, pre_norm: bool):
    """A contracting layer, two rows of four positions, and the tensors that get gradients, by name."""
    torch.manual_seed(0)
    cell = TransformerLayer(
        dim=6,
        ffn_dim=8,
        heads=2,
        head_dim=3,
        pre_norm=pre_norm,
        weight_norm=weight_norm,
        dropout=0.0,
        attention_dropout=0.0,
        local_size=0,
    ).double()
    cell.initialize(Initializer("normal", 0.3, 1.0))
    with torch.no_grad():
        (cell.out.weight_v if cell.out.weight_g is None else cell.out.weight_g).mul_(8.0)
        (cell.qkv.weight_v if cell.qkv.weight_g is None else cell.qkv.weight_g).mul_(0.3)
    u = torch.randn(2, 4, cell.injection_dim, dtype=torch.float64, requires_grad=True)
    return cell, u, {**dict(cell.named_parameters()), "injection": u}


def _weighting() -> torch.Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _bind(cell: TransformerLayer, u: torch.Tensor):
    return cell.prepare(cell.draw(2, 4, 0, u)).bind(u, None)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("active_set", ["always", "never"])
@pytest.mark.parametrize("backward_solver", ["anderson", "broyden", "picard"])
def test_ift_through_the_layer_is_a_dense_solve(backward_solver, active_set, weight_norm, pre_norm):
    cell, u, wanted = _layer(weight_norm, pre_norm)
    f, z0, weighting = _bind(cell, u), torch.zeros(2, 4, 6, dtype=torch.float64), _weighting()
    backward = SolverConfig(backward_solver, max_evals=400, rtol=1e-11, atol=0.0, active_set=active_set)
    state = fixed_point(f, z0, TIGHT, GradientConfig(solver=backward)).state
    found = torch.autograd.grad((state * weighting).sum(), list(wanted.values()))
    star = state.detach()
    jacobian = torch.autograd.functional.jacobian(f, star).reshape(48, 48)
    identity = torch.eye(48, dtype=torch.float64)
    adjoint = torch.linalg.solve(identity - jacobian.T, weighting.flatten()).view_as(star)
    expected = torch.autograd.grad(_bind(cell, u)(star), list(wanted.values()), adjoint)
    for name, a, b in zip(wanted, found, expected):
        assert (a - b).norm() <= 1e-8 * (1e-8 + b.norm()), name
    assert torch.linalg.vector_norm(found[-1]) > 1e-3


@pytest.mark.parametrize("weight_norm", [False, True])
def test_ift_through_the_layer_is_a_long_unroll(weight_norm):
    cell, u, wanted = _layer(weight_norm, pre_norm=False)
    z0, weighting = torch.zeros(2, 4, 6, dtype=torch.float64), _weighting()
    state = fixed_point(_bind(cell, u), z0, TIGHT, IFT).state
    found = torch.autograd.grad((state * weighting).sum(), list(wanted.values()))
    last = unroll(_bind(cell, u), z0, 200)
    expected = torch.autograd.grad((last * weighting).sum(), list(wanted.values()))
    for name, a, b in zip(wanted, found, expected):
        assert (a - b).norm() <= 1e-8 * (1e-8 + b.norm()), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_the_layer_gives_the_same_gradient(reentrant):
    cell, u, wanted = _layer(weight_norm=True, pre_norm=False)
    z0, weighting = torch.zeros(2, 4, 6, dtype=torch.float64), _weighting()

    def layer(u):
        return fixed_point(_bind(cell, u), z0, TIGHT, IFT).state

    expected = torch.autograd.grad((layer(u) * weighting).sum(), list(wanted.values()))
    (checkpoint(layer, u, use_reentrant=reentrant) * weighting).sum().backward()
    for (name, tensor), b in zip(wanted.items(), expected):
        assert (tensor.grad - b).norm() <= 1e-10 * (1e-8 + b.norm()), name


def test_accumulated_gradients_are_those_of_the_whole_batch():
    cell, u, wanted = _layer(weight_norm=True, pre_norm=False)
    z0, weighting = torch.zeros(2, 4, 6, dtype=torch.float64), _weighting()
    state = fixed_point(_bind(cell, u), z0, TIGHT, IFT).state
    expected = torch.autograd.grad((state * weighting).sum(), list(wanted.values()))
    for row in range(2):
        f = cell.prepare(cell.draw(1, 4, 0, u)).bind(u[row : row + 1], None)
        part = fixed_point(f, z0[:1], TIGHT, IFT).state
        (part * weighting[row : row + 1]).sum().backward()
    for (name, tensor), b in zip(wanted.items(), expected):
        assert (tensor.grad - b).norm() <= 1e-10 * (1e-8 + b.norm()), name


@pytest.mark.parametrize("mode", ["ift", "phantom", "jfb", "unroll"])
@pytest.mark.parametrize("training", [True, False])
def test_every_mode_tracks_when_gradients_are_enabled_and_only_then(mode, training):
    cell, u, _ = _layer(weight_norm=True, pre_norm=False)
    cell.train(training)
    z0 = torch.zeros(2, 4, 6, dtype=torch.float64)
    assert fixed_point(_bind(cell, u), z0, TIGHT, GradientConfig(mode)).state.requires_grad
    with torch.no_grad():
        assert not fixed_point(_bind(cell, u), z0, TIGHT, GradientConfig(mode)).state.requires_grad


@pytest.mark.parametrize("mode", ["ift", "phantom", "jfb"])
def test_what_autograd_keeps_does_not_grow_with_the_budget(mode):
    def kept(max_evals: int) -> int:
        cell, u, _ = _layer(weight_norm=True, pre_norm=False)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        solver = SolverConfig("picard", max_evals=max_evals, rtol=1e-30, atol=0.0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z0 = torch.zeros(2, 4, 6, dtype=torch.float64)
            fixed_point(_bind(cell, u), z0, solver, GradientConfig(mode, steps=2))
        return sum(sizes)

    assert kept(20) == kept(200) > 0
