"""Differences that grow old where lanes depend on each other."""

import numpy as np
import pytest
import torch
from problems import CausalMap

from fairseq_deq.solvers import SolverConfig, solve
from fairseq_deq.solvers.anderson import Anderson

C = 6


def _chain(seed, gain, positions=20):
    generator = torch.Generator().manual_seed(seed)
    return CausalMap(torch.randn(3, positions, C, generator=generator, dtype=torch.float64), gain)


def _solved(f, growth, **options):
    config = SolverConfig(max_evals=300, rtol=1e-6, atol=0.0, ridge_growth=growth, **options)
    return solve(f, torch.zeros_like(f.b), config)


@pytest.mark.parametrize("gain", [0.5, 0.7, 1.4])
def test_along_a_row_it_saves_evaluations_and_finds_the_same(gain):
    grown, alike = [], []
    for seed in range(4):
        f = _chain(seed, gain)
        one, other = _solved(f, 10.0), _solved(f, 1.0)
        assert one.converged.all()
        assert other.converged.all()
        assert torch.allclose(one.state, other.state, rtol=0, atol=1e-4)
        grown.append(one.lane_nfe.double().mean())
        alike.append(other.lane_nfe.double().mean())
    assert sum(grown) < 0.9 * sum(alike)


@pytest.mark.parametrize("options", [{"scope": "sample"}, {"scope": "batch"}, {}])
def test_independent_lanes_are_bitwise_those_of_an_even_ridge(options):
    f = _chain(0, 0.7, positions=20 if options else 1)
    one, other = _solved(f, 10.0, **options), _solved(f, 1.0, **options)
    assert torch.equal(one.state, other.state)
    assert torch.equal(one.lane_nfe, other.lane_nfe)


def test_the_ridge_of_every_slot_by_the_age_of_its_difference():
    config = SolverConfig(memory=5, ridge=1e-3, ridge_growth=10.0)
    method = Anderson(config, torch.zeros(2, C), np.zeros(2))
    by_age = [1e-3, 1e-2, 1e-1, 1.0]
    for newest in range(4):
        for age in range(4):
            assert method.ridges[newest, (newest - age) % 4] == pytest.approx(by_age[age])
    # It stops at 1, unless it begins beyond, and nothing grows from nothing.
    assert Anderson(SolverConfig(memory=5), torch.zeros(2, C), np.zeros(2)).ridges.max() == 1.0
    steep = Anderson(SolverConfig(memory=5, ridge=4.0), torch.zeros(2, C), np.zeros(2))
    assert np.array_equal(steep.ridges, np.full((4, 4), 4.0))
    assert not Anderson(SolverConfig(memory=5, ridge=0.0), torch.zeros(2, C), np.zeros(2)).ridges.any()


@pytest.mark.parametrize("value", [0.0, 0.99, -1.0, float("inf"), float("nan")])
def test_a_factor_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match="ridge_growth must be at least 1 and finite, got"):
        SolverConfig(ridge_growth=value)
