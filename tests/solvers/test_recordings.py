"""Programs of a recorded solve that serve later solves of the same kind, with other tensors."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import CausalMap
from torch import nn

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.layers.composition import compose
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.weight_norm import Initializer
from fairseq_deq.solvers import Preconditioner, SolverConfig, captured, recordings, solve
from fairseq_deq.solvers.held_tensors import Opaque, held, with_tensors


class Map:
    """tanh(z W^T + b), which says that it holds its tensors, and counts how often its code runs."""

    direction = 1
    holds_its_tensors = True
    runs = 0

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, z):
        type(self).runs += 1
        return torch.tanh(z @ self.w.mT + self.b)


class Lazy(Map):
    """The same, which prepares its matrix in its first evaluation."""

    def __call__(self, z):
        if "doubled" not in vars(self):
            self.doubled = 2 * self.w
        return torch.tanh(z @ self.doubled.mT * 0.5 + self.b)


def tensors(device, seed, length=6, width=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    w = 0.3 * torch.randn(width, width, generator=generator, dtype=torch.float64)
    b = torch.randn(2, length, width, generator=generator, dtype=torch.float64)
    return w.to(device, dtype), b.to(device, dtype)


def solved(f, like, preconditioner=None, **options):
    config = SolverConfig(**{"max_evals": 80, "rtol": 1e-8, "atol": 0.0, "cuda_graph": "auto", **options})
    return solve(f, torch.zeros_like(like), config, preconditioner)


def twice(f, like, **options):
    """A kind of solve is recorded when it comes for the second time."""
    solved(f, like, **options)
    return solved(f, like, **options)


@pytest.mark.parametrize("kind", [Map, Lazy])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_a_later_solve_replays_the_programs_of_the_first(kind, solver, device):
    runs = []
    for seed in range(3):
        w, b = tensors(device, seed)
        known = Preconditioner.from_jacobian(0.5 * w, 2)
        expected = solved(kind(w, b), b, known, solver=solver, cuda_graph="never", active_set="never")
        before = Map.runs
        found = solved(kind(w, b), b, known, solver=solver)
        runs.append(Map.runs - before)
        assert expected.converged.all()
        assert found.nfe == expected.nfe
        torch.testing.assert_close(found.state, expected.state, rtol=1e-7, atol=1e-8)
        assert torch.equal(found.status, expected.status)
    assert len(captured.kept) == 1
    assert not captured.refused
    if kind is Map:  # all; then a check and two recordings; then the check, and what was not met before
        assert runs[0] > 5
        assert runs[1] <= 3
        assert sum(runs[1:]) <= 5


def test_a_result_stays_what_it_was_when_the_next_solve_overwrites_the_buffers(device):
    results, copies = [], []
    for seed in range(4):
        w, b = tensors(device, seed)
        results.append(solved(Map(w, b), b))
        found = results[-1]
        copies.append([t.clone() for t in (found.state, found.residual, found.lane_nfe, found.status)])
    for found, copy in zip(results, copies):
        for tensor, then in zip((found.state, found.residual, found.lane_nfe, found.status), copy):
            assert torch.equal(tensor, then)


@pytest.mark.parametrize(
    "change", [{"rtol": 1e-6}, {"memory": 3}, {"damping": 0.5}, {"length": 7}, {"solver": "picard"}]
)
def test_another_kind_of_solve_has_its_own_programs(change, device):
    w, b = tensors(device, 0)
    twice(Map(w, b), b)
    change = dict(change)
    w, b = tensors(device, 1, change.pop("length", 6))
    found = twice(Map(w, b), b, **change)
    expected = solved(Map(w, b), b, **{**change, "cuda_graph": "never", "active_set": "never"})
    assert len(captured.kept) == 2
    assert found.nfe == expected.nfe
    torch.testing.assert_close(found.state, expected.state, rtol=1e-7, atol=1e-8)


def test_a_budget_is_no_kind_of_its_own(device):
    for budget in (80, 70, 9, 33):
        w, b = tensors(device, budget)
        found = solved(Map(w, b), b, max_evals=budget)
        expected = solved(Map(w, b), b, max_evals=budget, cuda_graph="never", active_set="never")
        assert found.nfe == expected.nfe
        torch.testing.assert_close(found.state, expected.state, rtol=1e-7, atol=1e-8)
    assert len(captured.kept) == 1


@pytest.fixture
def two_kept(made, monkeypatch):
    """Room for two recordings; and a list that grows with each that is made."""
    monkeypatch.setattr(captured, "kept", recordings.Kept(2))
    return made


def test_one_that_has_not_been_used_for_long_goes(two_kept, device):
    for length in (4, 5, 5, 5, 5, 5, 5, 5, 6):
        w, b = tensors(device, length, length)
        twice(Map(w, b), b)
        assert len(captured.kept) <= 2
    made = len(two_kept)
    w, b = tensors(device, 1, 6)
    solved(Map(w, b), b)
    assert len(two_kept) == made  # it took the place of the first


def test_more_kinds_than_can_be_kept_are_not_recorded_again_and_again(two_kept, device):
    made = []
    for _ in range(6):
        for length in (4, 5, 6, 7):
            w, b = tensors(device, length, length)
            found = solved(Map(w, b), b)
            assert found.converged.all()
        made.append(len(two_kept))
    assert made[0] == 0
    assert made[-1] == made[2]
    assert len(captured.kept) == 2


def test_solves_in_inference_mode_serve_others_and_are_served(device):
    for inference in (True, True, False, True):
        w, b = tensors(device, 3)
        with torch.inference_mode(inference):
            w, b = w.clone(), b.clone()
            found = solved(Map(w, b), b)
            expected = solved(Map(w, b), b, cuda_graph="never", active_set="never")
        torch.testing.assert_close(found.state.clone(), expected.state.clone(), rtol=1e-7, atol=1e-8)
    assert not captured.refused


def test_where_memory_runs_out_a_solve_goes_on_without_and_later_ones_try_again(device, monkeypatch, caplog):
    w, b = tensors(device, 0)
    solved(Map(w, b), b)
    made = recordings.Recording

    def too_large(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(captured, "Recording", too_large)
    assert solved(Map(w, b), b).converged.all()
    assert "since memory ran out" in caplog.text
    assert not captured.refused
    monkeypatch.setattr(captured, "Recording", made)
    twice(Map(w, b), b)
    assert len(captured.kept) == 1


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_the_precision_of_products_may_be_set_either_way(before, device):
    matmul = torch.backends.cuda.matmul
    kept_precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = before
        w, b = tensors(device, 0, dtype=torch.float32)
        for options in ({}, {"early_precision": "tf32"}):
            assert twice(Map(w, b), b, rtol=1e-4, **options).converged.all()
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = kept_precision


def test_a_map_that_does_not_say_what_it_holds_is_recorded_in_each_solve(device):
    _, b = tensors(device, 0)
    assert solved(CausalMap(b), b).converged.all()
    assert len(captured.kept) == 0
    assert not captured.refused


def test_a_map_whose_tensors_cannot_be_found_is_recorded_in_each_solve(device, caplog):
    w, b = tensors(device, 0)
    f = Map(w, b)
    vars(f)["inner"] = functools.partial(torch.add, w)
    for _ in range(3):
        assert solved(f, b).converged.all()
    assert len(captured.kept) == 0
    assert caplog.text.count("graphs of Map are recorded in each solve") == 1


def test_a_tensor_on_another_device_would_become_a_constant(device, caplog):
    w, b = tensors(device, 0)
    f = Map(w, b)
    vars(f)["scale"] = torch.ones((), device="meta")
    assert twice(f, b).converged.all()
    assert len(captured.kept) == 0
    assert "tensors on another device" in caplog.text


@pytest.mark.parametrize(
    ("layers", "weight_norm"),
    [(2, True), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, False), (1, True)))],
)
def test_gradients_follow_the_weights_from_update_to_update(layers, weight_norm, device):
    torch.manual_seed(0)
    parts = [
        TransformerLayer(
            16, 32, 2, 8, False, weight_norm, 0.0, 0.0, 0, activation="gelu", input_residual=True
        )
        for _ in range(layers)
    ]
    layer = compose(parts)
    layer.initialize(Initializer("normal", 0.05, 0.05))
    layer = layer.to(device).double()
    parameters = list(layer.parameters())
    z0 = torch.zeros(2, 12, 16, device=device).double()
    generator = torch.Generator().manual_seed(1)
    masks = layer.draw(2, 12, 0, z0)

    def gradients(u, **options):
        config = SolverConfig(max_evals=200, rtol=1e-6, atol=0.0, **options)
        f = layer.prepare(masks).bind(u, None)
        out = fixed_point(f, z0, config, GradientConfig(solver=config))
        assert out.result is not None
        assert out.result.converged.all()
        return torch.autograd.grad(out.state.square().cumsum(-1).sum(), parameters, allow_unused=True)

    for _ in range(4):
        u = torch.randn(2, 12, layer.injection_dim, generator=generator).to(device).double()
        found, expected = gradients(u, cuda_graph="auto"), gradients(u, active_set="never")
        for mine, theirs in zip(found, expected):
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, expected):
                if gradient is not None:
                    parameter -= 0.01 * gradient / gradient.norm().clamp(min=1e-6)
    assert len(captured.kept) == 2  # forward and backward
    assert not captured.refused


def test_under_autocast_a_changed_weight_is_read_anew(device):
    """Autocast keeps the converted copy of a weight; a program that read it would keep the old one."""

    class OfParameter(Map):
        def __init__(self, w, b):
            super().__init__(w, b)

        def __call__(self, z):
            return torch.tanh(nn.functional.linear(z, self.w) + self.b)

    w, b = tensors(device, 0, dtype=torch.float32)
    weight = nn.Parameter(w)
    states = []
    for _ in range(4):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            nn.functional.linear(b, weight)  # which puts it into the cache
            found = solved(OfParameter(weight, b), b, rtol=3e-2)
            expected = solved(OfParameter(weight, b), b, rtol=3e-2, cuda_graph="never", active_set="never")
        torch.testing.assert_close(found.state, expected.state, rtol=2e-2, atol=2e-2)
        states.append(found.state)
        with torch.no_grad():
            weight.neg_()
    assert (states[2] - states[3]).abs().max() > 0.1
    assert len(captured.kept) == 1


# ---------------------------------------------------------------------- what a map is made of


def test_things_of_one_kind_have_equal_keys_and_their_copies_other_tensors():
    f, g = Map(torch.ones(2, 2), torch.ones(1, 3, 2)), Map(torch.zeros(2, 2), torch.zeros(1, 3, 2))
    assert held(f).key == held(g).key
    assert [t.shape for t in held(f).tensors] == [(2, 2), (1, 3, 2)]
    copy = with_tensors(f, held(g).tensors)
    assert copy.w is g.w
    assert f.w is not g.w


@pytest.mark.parametrize(
    "other",
    [
        Map(torch.ones(2, 2), torch.ones(1, 4, 2)),
        Map(torch.ones(2, 2), torch.ones(1, 3, 2).double()),
        Map(torch.ones(2, 2), [torch.ones(1, 3, 2)]),
        Map(torch.ones(2, 2), None),
        Map(nn.Parameter(torch.ones(2, 2)), torch.ones(1, 3, 2)),
        Lazy(torch.ones(2, 2), torch.ones(1, 3, 2)),
    ],
)
def test_things_of_other_kinds_have_other_keys(other):
    assert held(other).key != held(Map(torch.ones(2, 2), torch.ones(1, 3, 2))).key


def test_a_tensor_that_is_held_twice_stays_one():
    w = torch.ones(2, 2)
    twice, apart = Map(w, w), Map(w, torch.ones(2, 2))
    assert held(twice).key != held(apart).key
    assert len(held(twice).tensors) == 1
    copy = with_tensors(twice, [torch.zeros(2, 2)])
    assert copy.w is copy.b


def test_a_parameter_is_not_copied_and_another_one_makes_another_key():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert not held([first]).tensors
    assert held([first]).key != held([second]).key
    assert with_tensors([first], [])[0] is first


def test_a_view_of_a_parameter_is_not_copied_either():
    parameter = nn.Parameter(torch.arange(4.0).view(2, 2))
    made_of = held([parameter.t(), parameter[:1]])
    assert not made_of.tensors
    assert made_of.key == held([parameter.t(), parameter[:1]]).key
    assert made_of.key != held([parameter.t(), parameter[1:]]).key


@pytest.mark.parametrize(
    "thing", [lambda z: z, functools.partial(torch.add, 1), nn.Linear(2, 2), torch.ones(1).add, {1}]
)
def test_what_may_hide_tensors_is_said_to(thing):
    with pytest.raises(Opaque, match="cannot be found"):
        held([thing])


def test_what_holds_itself_is_said_to():
    f = Map(torch.ones(1), None)
    f.b = [f]
    with pytest.raises(Opaque, match="holds itself"):
        held(f)
