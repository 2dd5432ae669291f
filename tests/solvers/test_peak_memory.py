"""What a solve holds at its peak does not grow with the evaluations that it is allowed."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.solvers import SolverConfig, solve

B, T, C = 2, 32, 32


def _peak(run) -> int:
    """The most bytes allocated at once while `run` runs, above those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


def _never(solver: str, max_evals: int) -> SolverConfig:
    """Options that let nothing converge, restart or stall."""
    scope = "sample" if solver == "gmres" else "position"
    return SolverConfig(
        solver, max_evals=max_evals, rtol=1e-30, atol=0.0, memory=6, scope=scope, patience=1000
    )


def _restless():
    """A map without an order that a solver could find, (B, T, C)."""
    generator = torch.Generator().manual_seed(0)
    weight = 5 * torch.randn(C, C, generator=generator) / C**0.5
    x = torch.randn(B, T, C, generator=generator)
    return lambda z: torch.sin(z @ weight.T + x)


def _slow():
    """An affine map that GMRES with a small memory gets on with, but slowly."""
    scale = torch.linspace(-0.97, 0.97, T * C, dtype=torch.float64).view(1, T, C)
    return lambda z: scale * z + 1.0


@pytest.mark.parametrize("solver", ["anderson", "broyden", "gmres"])
def test_of_a_solve(solver):
    f, dtype = (_slow(), torch.float64) if solver == "gmres" else (_restless(), torch.float32)
    z0, evaluations = torch.zeros(B, T, C, dtype=dtype), []

    def run(max_evals: int):
        evaluations.append(solve(f, z0, _never(solver, max_evals)).nfe)

    run(3)  # what an operator makes once and keeps does not count
    few, many = _peak(lambda: run(20)), _peak(lambda: run(200))
    assert evaluations[1] <= 20
    assert evaluations[2] > 150
    assert many <= 1.05 * few


@pytest.mark.parametrize(
    ("backward", "mode"), [("anderson", "ift"), ("broyden", "ift"), ("gmres", "ift"), ("anderson", "shine")]
)
def test_of_a_step_forward_and_backward(backward, mode):
    weight = torch.eye(C, dtype=torch.float64).mul_(0.95).requires_grad_()
    x = torch.linspace(-1, 1, B * T * C, dtype=torch.float64).view(B, T, C)
    evaluations = []

    def run(max_evals: int):
        gradient = GradientConfig(mode, _never(backward, max_evals), refine=max_evals)
        f, forward = lambda z: torch.tanh(z @ weight.T + x), _never("anderson", 10)
        layer = fixed_point(f, torch.zeros_like(x), forward, gradient)
        (layer.state * x.flip(2)).sum().backward()
        lanes, total = layer.backward.sums[:2].tolist()
        evaluations.append(total / lanes)
        weight.grad = None

    run(3)
    few, many = _peak(lambda: run(40)), _peak(lambda: run(200))
    assert evaluations[1] <= 40
    assert evaluations[2] > 60 or backward == "gmres"  # which stalls where it cannot come closer
    assert many <= 1.05 * few
