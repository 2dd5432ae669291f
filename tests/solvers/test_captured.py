"""A solve whose iterations are recorded once and replayed: the same results, and f's code runs few times."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from gpu.launches import kernels
from problems import CausalMap, assert_causal

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.weights import DropoutMasks
from fairseq_deq.layers.weight_norm import Initializer
from fairseq_deq.solvers import (
    Preconditioner,
    SolverConfig,
    captured,
    graph_pool,
    registry,
    solve,
)
from fairseq_deq.solvers.picard import Picard


class Counted:
    """A map that cannot be restricted, and how often its code ran."""

    direction = 1

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, z):
        self.calls += 1
        return self.f(z)


def inputs(device, batch=3, length=12, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype).to(device)


def both(f, z0, preconditioner=None, **options):
    """Launch by launch with all lanes, and recorded."""
    eager = solve(f, z0, SolverConfig(active_set="never", **options), preconditioner)
    found = solve(f, z0, SolverConfig(cuda_graph="auto", **options), preconditioner)
    assert not captured.refused
    return eager, found


def assert_same(found, expected, tolerance=1e-8):
    assert found.nfe == expected.nfe
    assert found.total_lane_nfe == expected.total_lane_nfe
    torch.testing.assert_close(found.state, expected.state, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.status, expected.status)
    assert torch.equal(found.lane_nfe, expected.lane_nfe)


@pytest.mark.parametrize(
    ("scope", "memory"), [("position", 0), ("position", 12), ("sample", 3), ("batch", 0)]
)
def test_anderson_finds_the_same_in_as_many_iterations(scope, memory, device):
    b = inputs(device)
    expected, found = both(
        CausalMap(b), torch.zeros_like(b), scope=scope, memory=memory, max_evals=120, rtol=1e-8
    )
    assert expected.converged.all()
    assert_same(found, expected)


def test_picard_finds_the_same(device):
    b = inputs(device)
    expected, found = both(CausalMap(b, 0.7), torch.zeros_like(b), solver="picard", max_evals=200, rtol=1e-9)
    assert expected.converged.all()
    assert_same(found, expected)


@pytest.mark.parametrize(("scope", "memory"), [("position", 0), ("position", 5), ("batch", 0)])
def test_broyden_finds_the_same_in_as_many_iterations(scope, memory, device):
    b = inputs(device)
    expected, found = both(
        *(CausalMap(b), torch.zeros_like(b)),
        **{"solver": "broyden", "scope": scope, "memory": memory, "max_evals": 200, "rtol": 1e-8},
    )
    assert expected.converged.all()
    assert_same(found, expected)


def test_a_solver_that_is_not_recorded_goes_on_as_without_the_option(device, monkeypatch):
    class Uneven(Picard):
        alike = False

    monkeypatch.setitem(registry._METHODS, "uneven", Uneven)
    monkeypatch.setattr(captured, "capture", None)
    b = inputs(device)
    config = SolverConfig(solver="uneven", max_evals=200, rtol=1e-9)
    expected = solve(CausalMap(b, 0.7), torch.zeros_like(b), config)
    found = solve(CausalMap(b, 0.7), torch.zeros_like(b), replace(config, cuda_graph="auto"))
    assert expected.converged.all()
    assert expected.total_lane_nfe < expected.nfe * expected.status.numel()
    assert_same(found, expected)


@pytest.mark.parametrize("budget", [1, 2, 3, 13, 20])
def test_a_budget_that_runs_out_ends_at_the_same_state(budget, device):
    b = inputs(device)
    expected, found = both(CausalMap(b), torch.zeros_like(b), max_evals=budget, rtol=1e-13, atol=0.0)
    assert_same(found, expected, 1e-6)


def test_lanes_that_restart_and_that_are_never_finite(device):
    b = inputs(device)
    b[1, 4] = float("nan")
    expected, found = both(CausalMap(b, 6.0), torch.zeros_like(b), max_evals=60, rtol=1e-6)
    assert not expected.converged.all()
    assert found.nfe == expected.nfe
    assert torch.equal(found.status, expected.status)
    assert torch.isfinite(found.state).all()


def test_a_preconditioner_serves(device):
    b = inputs(device)
    f = CausalMap(b, 1.4)
    known = Preconditioner.from_jacobian(0.5 * f.own, 4)
    expected, found = both(f, torch.zeros_like(b), known, max_evals=200, rtol=1e-9)
    assert expected.converged.all()
    assert_same(found, expected)


def test_the_code_of_f_runs_for_the_first_of_each_kind_and_two_recordings(device):
    b = inputs(device, 4, 30, 8, torch.float32)
    f = Counted(CausalMap(b))
    config = SolverConfig(max_evals=40, rtol=1e-7, atol=0.0, cuda_graph="auto")
    result = solve(f, torch.zeros_like(b), config)
    assert result.nfe == 40
    assert f.calls == 5  # a check, an iteration, a recheck; and both once more
    if device.type == "cuda":
        plain = kernels(lambda: solve(f, torch.zeros_like(b), replace(config, cuda_graph="never")))
        assert kernels(lambda: solve(f, torch.zeros_like(b), config)) < 0.4 * plain


def test_a_solve_does_not_touch_what_another_one_found(device):
    first = inputs(device)
    config = SolverConfig(max_evals=60, rtol=1e-8, cuda_graph="auto")
    found = solve(CausalMap(first), torch.zeros_like(first), config)
    kept = found.state.clone(), found.residual.clone()
    solve(CausalMap(first.flip(0) * 2), torch.ones_like(first), config)
    assert torch.equal(found.state, kept[0])
    assert torch.equal(found.residual, kept[1])


def test_a_map_that_asks_the_host_goes_on_launch_by_launch_and_says_so(device, caplog):
    b = inputs(device)
    inner = CausalMap(b, 0.7)

    def asking(z):
        return inner(z) if float(z.sum()) < 1e30 else z

    expected, _ = both(inner, torch.zeros_like(b), max_evals=60, rtol=1e-8)
    config = SolverConfig(cuda_graph="auto", max_evals=60, rtol=1e-8)
    with caplog.at_level(logging.WARNING):
        found = solve(asking, torch.zeros_like(b), config)
    assert any("cannot be recorded" in r.getMessage() for r in caplog.records)
    assert found.converged.all()
    torch.testing.assert_close(found.state, expected.state, rtol=1e-6, atol=1e-7)
    caplog.clear()
    again = solve(asking, torch.zeros_like(b), config)  # not tried again
    assert not caplog.records
    assert len(captured.refused) == 1
    assert torch.equal(again.state, found.state)


def test_what_is_no_matter_of_recording_ends_a_solve(device, monkeypatch):
    def late(program, buffers):
        raise TimeoutError

    monkeypatch.setattr(captured, "capture", late)
    b = inputs(device)
    with pytest.raises(TimeoutError):
        solve(CausalMap(b), torch.zeros_like(b), SolverConfig(cuda_graph="auto", max_evals=60, rtol=1e-8))


def test_nothing_of_a_solve_stays_once_it_has_returned(device):
    b = inputs(device)
    # The first solve and the first recording of a process keep more than they do later.
    solve(CausalMap(b), torch.zeros_like(b), SolverConfig(max_evals=20, rtol=1e-8, cuda_graph="auto"))
    f = CausalMap(b)
    alive = weakref.ref(f)
    gc.collect()
    gc.disable()
    try:
        loop = captured.CapturedLoop(f, torch.zeros_like(b), SolverConfig(max_evals=20, cuda_graph="auto"))
        books = weakref.ref(loop.active)
        loop.run()
        assert loop.launched == {"iteration", "recheck"}
        del loop, f
        assert books() is None
        assert alive() is None
    finally:
        gc.enable()


def test_an_iteration_launched_among_replayed_ones_is_seen_by_them(device):
    """Where rules are compiled, the first recheck goes launch by launch, after iterations were recorded."""
    b = inputs(device)
    options = {"max_evals": 120, "rtol": 1e-8}
    f = Counted(CausalMap(b))
    expected = solve(f, torch.zeros_like(b), SolverConfig(**options))
    f.calls = 0
    with torch.no_grad():
        loop = captured.CapturedLoop(f, torch.zeros_like(b), SolverConfig(cuda_graph="auto", **options))
        loop.fused = True
        found = loop.run()
    assert f.calls == 5
    assert_same(found, expected)


# Of three buffers a, b and c: what a program makes of each.
HANDED_ON = {
    "to the one before": lambda a, b, c: [b, c, a + 1],
    "to the one after": lambda a, b, c: [c + 1, a, b],
    "in a circle": lambda a, b, c: [b, c, a],
    "two of one": lambda a, b, c: [b.T, b * 2, b],
    "its own, otherwise": lambda a, b, c: [a.T, b, c[:, [1, 0]]],
    "changed in place": lambda a, b, c: [b, b.add_(1), c],
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_a_program_hands_on_is_read_before_it_is_overwritten(name):
    buffers = [torch.arange(4.0).view(2, 2) + 10 * i for i in range(3)]
    expected = [tensor.clone() for tensor in HANDED_ON[name](*(buffer.clone() for buffer in buffers))]
    captured.write_back(HANDED_ON[name](*buffers), buffers)
    for buffer, tensor in zip(buffers, expected):
        assert torch.equal(buffer, tensor)


class Recording:
    """`torch.cuda.CUDAGraph` and the memory it records to; after a question to the host it is lost."""

    asked = False
    underway: set[int] = set()
    known: set[int] = set()  # in a second place, where no recording that is lost can be ended
    released: list[int] = []

    def capture_begin(self, pool, capture_error_mode):
        assert pool not in self.underway | self.known
        self.pool = pool
        self.underway.add(pool)
        self.known.add(pool)

    def capture_end(self):
        if Recording.asked:
            Recording.asked = False
            raise RuntimeError("lost")
        self.underway.remove(self.pool)
        self.known.remove(self.pool)


def test_after_a_recording_that_is_lost_the_next_one_can_be_made(monkeypatch):
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})()
    handles = itertools.count()
    for module, name, value in (
        (torch.cuda, "CUDAGraph", Recording),
        (torch.cuda, "Stream", lambda device: stream),
        (torch.cuda, "current_stream", lambda device: stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "graph_pool_handle", lambda: next(handles)),
        (torch._C, "_cuda_endAllocateToPool", lambda device, pool: Recording.underway.remove(pool)),
        (torch._C, "_cuda_releasePool", lambda device, pool: Recording.released.append(pool)),
    ):
        monkeypatch.setattr(module, name, value, raising=False)

    def ask():
        Recording.asked = True
        raise RuntimeError("asked")

    pool = graph_pool._Pool(torch.device("cpu"))
    first, handle = pool.holder, pool.handle
    with pytest.raises(RuntimeError, match="asked"):
        pool.record(ask)
    assert not Recording.underway
    assert Recording.released == [handle]
    assert pool.holder is not first
    assert pool.record(lambda: None).pool != handle


@pytest.fixture
def bound(device):
    """A published layer with a memory, bound to a segment; and its parameters."""
    torch.manual_seed(0)
    layer = TransformerLayer(16, 32, 2, 8, False, False, 0.0, 0.0, 0)
    layer.initialize(Initializer("normal", 0.05, 0.05))
    layer = layer.to(device).double()
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, 20, 3 * 16, generator=generator).to(device).double()
    memory = torch.randn(2, 8, 16, generator=generator).to(device).double()

    def bind():
        prepared = layer.prepare(DropoutMasks())
        with torch.no_grad():
            past = prepared.context(memory, u[:, :8], None)
        return prepared.bind(u[:, 8:], past)

    return bind, list(layer.parameters()), torch.zeros(2, 12, 16, device=device).double()


def test_gradients_of_the_transformer_layer_are_the_same(bound, device):
    bind, parameters, z0 = bound
    weighting = torch.randn(z0.shape, generator=torch.Generator().manual_seed(2)).to(device).double()

    def gradients(**options):
        config = SolverConfig(max_evals=300, rtol=1e-9, atol=0.0, **options)
        out = fixed_point(bind(), z0, config, GradientConfig(solver=config))
        assert out.result is not None
        assert out.result.converged.all()
        assert not captured.refused
        return torch.autograd.grad((out.state * weighting).sum(), parameters)

    for found, expected in zip(gradients(cuda_graph="auto"), gradients(active_set="never")):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_backward_solve_of_autograd_is_not_recorded(device, made):
    b = inputs(device).requires_grad_()
    f = CausalMap(b, 0.7)
    gradients = []
    for options in ({"cuda_graph": "auto"}, {"active_set": "never"}):
        config = SolverConfig(max_evals=60, rtol=1e-9, atol=0.0, **options)
        out = fixed_point(f, torch.zeros_like(b), config, GradientConfig(solver=config))
        before = len(made)
        gradients.append(torch.autograd.grad(out.state.square().sum(), b)[0])
        assert len(made) == before
    assert made
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_a_changed_position_leaves_all_before_it_unchanged(device):
    b = inputs(device, dtype=torch.float32)
    config = SolverConfig(max_evals=14, rtol=1e-5, cuda_graph="auto")
    assert_causal(lambda b: solve(CausalMap(b), torch.zeros_like(b), config).state, b, (1, 6, 11))
