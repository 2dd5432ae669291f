"""A solve whose books are on its device: what it finds, and what it costs to ask for it."""

from __future__ import annotations

import logging

import pytest
import torch
from gpu.launches import Launches, kernels
from problems import CausalMap, assert_causal

from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.weights import DropoutMasks
from fairseq_deq.layers.weight_norm import Initializer
from fairseq_deq.solvers import (
    Preconditioner,
    SolverConfig,
    captured,
    fused,
    release_recordings,
    solve,
)

SOLVERS = ("anderson", "broyden", "picard")


def inputs(batch=3, length=12, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)


class Plain:
    """A map that cannot be restricted."""

    direction = 1

    def __init__(self, f):
        self.f = f

    def __call__(self, z):
        return self.f(z)


@pytest.fixture
def compiled():
    """Rules are compiled in this test."""
    fused.fuse(True)
    yield
    fused.fuse(False)


@pytest.mark.parametrize("scope", ["position", "sample", "batch"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_equilibria_are_those_of_a_cpu(solver, scope, request):
    b, gain = inputs(), 0.7  # plain iteration contracts
    config = SolverConfig(solver=solver, scope=scope, max_evals=200, rtol=1e-10, atol=0.0, memory=6)
    expected = solve(CausalMap(b, gain), torch.zeros_like(b), config)  # before books are forced
    device = request.getfixturevalue("device")
    b = b.to(device)
    found = solve(CausalMap(b, gain), torch.zeros_like(b), config)
    assert expected.converged.all()
    assert found.converged.all()
    assert found.state.device.type == found.residual.device.type == device.type
    torch.testing.assert_close(found.state.cpu(), expected.state, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_unconverged_solve_goes_the_way_of_a_cpu(solver, request):
    b = inputs()
    config = SolverConfig(solver=solver, max_evals=9, rtol=1e-12, atol=0.0, active_set="never")
    expected = solve(CausalMap(b), torch.zeros_like(b), config)
    device = request.getfixturevalue("device")
    found = solve(CausalMap(b.to(device)), torch.zeros_like(b).to(device), config)
    torch.testing.assert_close(found.state.cpu(), expected.state, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.status.cpu(), expected.status)


def test_a_preconditioner_serves_on_the_device(device):
    b = inputs().to(device)
    f = CausalMap(b, 1.4)
    known = Preconditioner.from_jacobian(0.5 * f.own, 4)
    config = SolverConfig(max_evals=300, rtol=1e-10, atol=0.0)
    result = solve(f, torch.zeros_like(b), config, preconditioner=known)
    assert result.converged.all()
    assert float((f(result.state) - result.state).abs().max()) < 1e-8


@pytest.mark.parametrize("budget", [1, 7, 30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_changed_position_leaves_all_before_it_bitwise_unchanged(solver, budget, device):
    b = inputs(dtype=torch.float32).to(device)
    config = SolverConfig(solver=solver, max_evals=budget, rtol=1e-4, active_set="auto")
    assert_causal(lambda b: solve(CausalMap(b), torch.zeros_like(b), config).state, b, (1, 6, 11))


def test_a_lane_that_is_never_finite_says_so_and_leaves_the_others_alone(device):
    b = inputs(dtype=torch.float32).to(device)
    spoilt = b.clone()
    spoilt[1] = float("nan")
    config = SolverConfig(max_evals=20, rtol=1e-4)
    whole = solve(CausalMap(b), torch.zeros_like(b), config)
    found = solve(CausalMap(spoilt), torch.zeros_like(b), config)
    assert torch.equal(found.state[[0, 2]], whole.state[[0, 2]])
    assert torch.isfinite(found.state).all()


# Operations beside f, an iteration, of a solve of fixed shape. Lower them where you can.
MOST = {"anderson": 118, "broyden": 125, "picard": 84}


@pytest.mark.parametrize("solver", MOST)
def test_launches_and_waits_of_an_iteration_are_bounded(solver, device):
    b = inputs(4, 30, 8, torch.float32).to(device)
    config = SolverConfig(solver=solver, max_evals=40, rtol=1e-6, atol=0.0, active_set="never")
    counted = Launches()
    f = Plain(counted.leaving_out(CausalMap(b)))
    z0 = torch.zeros_like(b)
    with counted:
        solve(f, z0, config)
    assert counted.an_iteration < MOST[solver], counted.operations.most_common(12)
    assert counted.waits_an_iteration <= 0.25


def test_compiled_rules_find_the_same_in_fewer_kernels(device, compiled):
    b = inputs(4, 30, 8, torch.float32).to(device)
    config = SolverConfig(max_evals=60, rtol=1e-5, atol=0.0, active_set="never")

    def run():
        return solve(Plain(CausalMap(b)), torch.zeros_like(b), config)

    found = run()
    fused.fuse(False)
    expected = run()
    assert expected.converged.all()
    assert found.converged.all()
    torch.testing.assert_close(found.state, expected.state, rtol=1e-3, atol=1e-4)
    if device.type == "cuda":
        plain = kernels(run)
        fused.fuse(True)
        assert kernels(run) < 0.5 * plain


def test_rules_that_cannot_be_compiled_go_on_as_they_are(device, compiled, monkeypatch, caplog):
    def refuse(rule, **options):
        def call(*args):
            raise torch._dynamo.exc.BackendCompilerFailed(refuse, RuntimeError("no compiler"), None)

        return call

    @fused.fused
    def doubled(x):
        return 2 * x

    monkeypatch.setattr(torch, "compile", refuse)
    x = torch.ones(2, device=device)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(doubled(x), 2 * x)
        assert torch.equal(doubled(x), 2 * x)
    assert sum("cannot be compiled" in r.getMessage() for r in caplog.records) == 1


def test_a_recording_outlives_others_and_a_cleared_cache(device):
    """Destroying a graph, and giving memory back to the device, must not take what other graphs use."""
    if device.type != "cuda":
        pytest.skip("graphs are recorded on CUDA only")
    release_recordings()
    generator = torch.Generator().manual_seed(3)

    layer = TransformerLayer(64, 256, 4, 16, False, False, 0.0, 0.0, 0, input_residual=True)
    layer.initialize(Initializer("normal", 0.05, 0.05))
    layer = layer.to(device)

    def solved(length, **options):
        u = torch.randn(4, length, layer.injection_dim, generator=generator).to(device)
        f = layer.prepare(DropoutMasks()).bind(u, None)
        config = SolverConfig(max_evals=30, rtol=1e-4, **options)
        with torch.no_grad():
            return f, solve(f, torch.zeros(4, length, 64, device=device), config)

    for length in (32, 48, 32, 48):
        solved(length, cuda_graph="auto")
    assert len(captured.kept) == 2
    first = next(iter(captured.kept._recordings))
    assert captured.kept.take(first) is not None  # and destroyed
    torch.cuda.empty_cache()
    filler = [torch.full((2**20,), float("nan"), device=device) for _ in range(64)]
    f, found = solved(48, cuda_graph="auto")
    with torch.no_grad():
        fz = f(found.state)
    assert found.converged.all()
    assert float(((fz - found.state).norm(dim=-1) / fz.norm(dim=-1)).max()) < 2e-4
    assert all(bool(tensor.isnan().all()) for tensor in filler)
    release_recordings()
