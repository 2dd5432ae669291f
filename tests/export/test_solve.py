"""The solver that an export takes along is the package's, step by step, also where solves fail."""

import pytest
import torch
from problems import CausalMap, expanding, solvable
from selection import every_pair

from fairseq_deq.export.remote.options_deq import SolveOptions
from fairseq_deq.export.remote.rows_deq import Preconditioner
from fairseq_deq.export.remote.solve_deq import rechecks, solve
from fairseq_deq.solvers import Preconditioner as TheirPreconditioner
from fairseq_deq.solvers import SolverConfig
from fairseq_deq.solvers import solve as their_solve
from fairseq_deq.solvers.schedule import recheck_iterations

BUDGETS = (1, 2, 5, 12, 13, 14, 40, 80)


class Directed(CausalMap):
    """Says that a position is final when all before it are."""

    direction = 1


def causal(seed, gain=1.4, width=6):
    torch.manual_seed(seed)
    f = Directed(torch.randn(2, 9, width, dtype=torch.float64), gain)
    return f, torch.zeros(2, 9, width, dtype=torch.float64)


def not_a_number(z):
    """Never finite at the second position of a row."""
    out = 0.5 * z + 1
    return torch.where(torch.arange(z.shape[1]).view(1, -1, 1) == 1, torch.nan, out)


def exploding(z):
    return z**3 - 2 * z + 0.7


def kinked(z):
    return (1.9 * z - 1.1).abs() - 0.5 * z.roll(1, -1)


MAPS = {
    **{p.name: (p.f, p.z0) for p in (*solvable(torch.float64), expanding(torch.float64))},
    **{f"causal-{seed}": causal(seed) for seed in range(4)},
    "causal and wild": causal(0, gain=3.0),
    "not a number": (not_a_number, torch.zeros(2, 3, 4, dtype=torch.float64)),
    "exploding": (exploding, torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 4)),
    "kinked": (kinked, torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 4)),
    "alone": (exploding, torch.linspace(-2, 2, 20, dtype=torch.float64).view(5, 1, 4)),
}


def as_causal(f):
    """An export takes every f for one that looks back only: say so to the package."""
    if getattr(f, "direction", 0) == 1:
        return f

    class Causal:
        direction = 1

        def __call__(self, z):
            return f(z)

    return Causal()


@every_pair(solver=["anderson", "picard", "anderson with P"], name=list(MAPS), budget=BUDGETS)
def test_states_evaluations_and_residuals_are_those_of_the_package(solver, name, budget):
    f, z0 = MAPS[name]
    left, right = (0.3 * torch.randn(2, z0.shape[-1], 2, generator=torch.Generator().manual_seed(3))).double()
    has_p, method = solver.endswith("P"), solver.split()[0]
    options = SolveOptions(method, budget, 1e-6, 0.0, 4, 0.9)
    found = solve(
        f, z0, torch.ones(z0.shape[:2]).bool(), options, Preconditioner(left, right) if has_p else None
    )
    memory = 4 if method == "anderson" else 0
    config = SolverConfig(method, budget, rtol=1e-6, atol=0.0, memory=memory, damping=0.9, active_set="never")
    theirs = their_solve(as_causal(f), z0, config, TheirPreconditioner(left, right) if has_p else None)
    assert torch.equal(found.converged, theirs.converged)
    assert torch.equal(found.evaluations, theirs.lane_nfe)
    # A position that wanders for many evaluations multiplies the rounding of its first ones.
    wanders = 1e-3 * (~theirs.converged).unsqueeze(-1) * (budget > 40)
    assert ((found.state - theirs.state).abs() <= 1e-8 + 1e-5 * theirs.state.abs() + wanders).all()
    # Single precision is what a residual is told in; one of rounding alone is another matter.
    assert torch.allclose(found.residual.double(), theirs.residual, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 2, 3, 12, 13, 14, 17, 40, 100, 300])
def test_rechecks_are_those_of_the_package(budget):
    assert rechecks(budget) == set(recheck_iterations(SolverConfig().first_recheck, budget))


def test_padding_stays_where_it_started_and_costs_nothing():
    f, z0 = causal(0, gain=0.8)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 5:] = False
    z0 = z0 + 0.25
    options = SolveOptions("anderson", 60, 1e-8, 0.0, 5, 1.0)
    found, whole = solve(f, z0, real, options), solve(f, z0, torch.ones_like(real), options)
    assert torch.equal(found.state[real], whole.state[real])
    assert torch.equal(found.state[~real], z0[~real])
    assert not found.evaluations[~real].any()
    assert not found.converged[~real].any()
    assert found.converged[real].all()
