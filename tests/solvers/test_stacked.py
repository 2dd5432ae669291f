"""The methods for a GPU, whose histories are one tensor, beside those for a CPU: the same steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairseq_deq.solvers import Preconditioner, SolverConfig
from fairseq_deq.solvers.anderson import Anderson
from fairseq_deq.solvers.broyden import Broyden
from fairseq_deq.solvers.stacked_anderson import StackedAnderson
from fairseq_deq.solvers.stacked_broyden import StackedBroyden

LANES, WIDTH = 6, 5
PAIRS = [(Anderson, StackedAnderson), (Broyden, StackedBroyden)]


def known(generator):
    jacobian = 0.5 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return Preconditioner.from_jacobian(jacobian, 3)


class Both:
    """A method for the CPU and one for a device, which are told the same."""

    def __init__(self, classes, memory, lanes=LANES, **options):
        config = SolverConfig(memory=memory, max_evals=100, **options)
        like = torch.zeros(lanes, WIDTH, dtype=torch.float64)
        self.host = classes[0](config, like, np.ones(lanes))
        self.stacked = classes[1](config, like, torch.ones(lanes, dtype=torch.float64))

    def steps(self, z, g, tau, restarted, precondition):
        forget = torch.from_numpy(restarted) if restarted.any() else None
        products = [p.numpy() for p in self.host.observe(z, g, restarted, precondition)]
        stacked = self.stacked.observe(z, g, forget, precondition)
        expected = self.host.step(np.stack(products) if products else [], z, g, tau, precondition)
        found = self.stacked.step(
            torch.stack(stacked) if stacked else [], z, g, torch.from_numpy(tau), precondition
        )
        return expected, found

    def subset(self, source):
        part = object.__new__(Both)
        part.host = self.host.subset(source)
        part.stacked = self.stacked.subset(torch.from_numpy(source))
        return part

    def skip(self):
        self.host.skip()
        self.stacked.skip()


@pytest.mark.parametrize("memory", [2, 5, 20])
@pytest.mark.parametrize("classes", PAIRS, ids=["anderson", "broyden"])
def test_the_steps_are_the_same_whatever_happens_to_the_history(classes, memory):
    """Steps until the history is full several times, restarts, skipped iterations, and other lanes."""
    generator = torch.Generator().manual_seed(memory)
    draw = np.random.default_rng(memory)
    both, precondition = Both(classes, memory), known(generator)
    z, lanes = torch.randn(LANES, WIDTH, generator=generator, dtype=torch.float64), LANES
    for k in range(40):
        g = torch.cos(2 * z).roll(1, 1) - z
        tau = draw.choice([0.5, 1.0], lanes)
        expected, found = both.steps(z, g, tau, draw.random(lanes) < 0.05, precondition)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        z = expected
        if k % 11 == 10:
            both.skip()
        if k % 13 == 12:
            source = draw.integers(-1, lanes, LANES - 1)  # -1: a lane without a history
            both, lanes = both.subset(source), LANES - 1
            z = z[torch.from_numpy(source).clamp(min=0)]


@pytest.mark.parametrize("classes", PAIRS, ids=["anderson", "broyden"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_estimates_of_the_inverse_are_the_same(classes, steps):
    generator = torch.Generator().manual_seed(3)
    both, precondition = Both(classes, 6), known(generator)
    z = torch.randn(LANES, WIDTH, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        g = torch.cos(z).roll(1, 1) - z
        z, _ = both.steps(z, g, np.ones(LANES), np.zeros(LANES, bool), precondition)
    vector = torch.randn(LANES, WIDTH, generator=generator, dtype=torch.float64)
    expected = both.host.inverse_transpose(vector, precondition)
    assert not torch.equal(expected, precondition(vector)) or steps == 1
    found = both.stacked.inverse_transpose(vector, precondition)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_no_more_steps_are_stored_than_the_budget_allows():
    method = StackedBroyden(SolverConfig(max_evals=7), torch.zeros(2, WIDTH), torch.ones(2))
    assert method.steps.shape == (2, 7, WIDTH)
