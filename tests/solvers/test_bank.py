"""Every solver on every map of the bank: known fixed points, and maps that have none."""

from __future__ import annotations

import math

import pytest
import torch
from problems import CASES, Case, Pointwise

from fairseq_deq.solvers import FixedPoint, SolverConfig, Status, solve, solver_names

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 3e-2}
BUDGET = 80
# Scope, and which lanes are evaluated: a matter of cost alone, so that every outcome of a scope is the same.
MODES = {
    torch.float64: [
        *[("position", "always"), ("position", "auto"), ("position", "never")],
        *[("sample", "always"), ("sample", "never"), ("batch", "never")],
    ],
    torch.float32: [("position", "always"), ("batch", "never")],
    torch.bfloat16: [("position", "auto"), ("sample", "never")],
}


def _solved(solver: str, case: Case, dtype: torch.dtype, scope: str, active_set: str):
    config = SolverConfig(
        solver,
        max_evals=BUDGET,
        rtol=TOLERANCE[dtype] if case.relative else 0.0,
        atol=0.0 if case.relative else TOLERANCE[dtype],
        scope=scope,
        memory=0 if solver == "picard" else 8,
        active_set=active_set,
        patience=6 if case.name == "expanding" else 40,  # a residual may rise for long before it falls
    )
    f = case.make(dtype)
    return solve(f, case.z0.to(dtype), config), f, config


def _check_sound(result: FixedPoint, f: Pointwise, config: SolverConfig, case: Case, dtype: torch.dtype):
    """What holds for the outcome of any solve of any map; claims are checked in float64."""
    lanes = {"position": (2, 3), "sample": (2,), "batch": (1,)}[config.scope]
    assert result.state.shape == case.z0.shape
    assert result.state.dtype == dtype
    assert torch.isfinite(result.state).all()
    for column in (result.status, result.lane_nfe, result.residual):
        assert column.shape == lanes
    assert not torch.isnan(result.residual).any()
    assert result.nfe == f.calls <= config.max_evals
    assert (result.lane_nfe <= result.nfe).all()
    assert result.total_lane_nfe <= result.nfe * math.prod(lanes)

    exact, state = case.make(torch.float64), result.state.double()
    distance, size, before, own = (
        x.reshape(*lanes, -1).norm(dim=-1)
        for x in (exact(state) - state, exact(state), exact(case.z0) - case.z0, state)
    )
    rounding = 2 * torch.finfo(dtype).eps * (size + own)
    limit = config.rtol * size + config.atol * (case.z0.numel() / math.prod(lanes)) ** 0.5
    limit = 1.05 * limit + case.stiffness * rounding
    assert (distance <= limit)[result.converged].all(), "it claims a residual that it does not have"
    if config.scope != "position":  # there a state counts for more than an older one, if not much worse
        known = torch.isfinite(before)
        assert (distance <= 1.01 * before + rounding)[known].all(), "it is worse than the start"
    if case.solution is not None:
        error = (state - case.solution).reshape(*lanes, -1).norm(dim=-1)
        assert (error <= case.stiffness * limit)[result.converged].all()


def _check_status(result: FixedPoint, case: Case, solver: str, config: SolverConfig, dtype: torch.dtype):
    found, sentence = {Status(s) for s in result.status.flatten().tolist()}, result.explain()
    if case.name == "NaN everywhere" or (case.spoilt is not None and config.scope == "batch"):
        assert found == {Status.NON_FINITE}, sentence
        assert torch.isinf(result.residual).all()
        assert torch.equal(result.state, case.z0.to(dtype))
    elif case.spoilt is not None:
        assert (result.status[case.spoilt] == Status.NON_FINITE).all(), sentence
        assert torch.equal(result.state[case.spoilt], case.z0[case.spoilt].to(dtype))
        assert result.converged[1 - case.spoilt].all(), sentence
    elif case.name == "singular, none":
        # z + 1 is z in this precision once z is large enough: only there may it seem to be a fixed point.
        large = result.state.abs().double() * torch.finfo(dtype).eps >= 0.2 * config.atol
        assert large.flatten(1).any(1).all() or not result.converged.any(), sentence
    elif not case.solvable:
        assert not result.converged.any(), sentence
        if case.name in ("overflow", "NaN late"):
            assert found <= {Status.NON_FINITE, Status.DIVERGED, Status.STALLED}, sentence
    elif solver != "picard" or (case.rate is not None and case.rate**BUDGET < 0.01 * TOLERANCE[dtype]):
        assert found == {Status.CONVERGED}, sentence
    elif case.rate is not None:
        assert found <= {Status.CONVERGED, Status.MAX_ITER}, sentence
    elif case.name == "expanding":  # no step length makes a slope of 3 contract
        assert found <= {Status.DIVERGED, Status.STALLED}, sentence


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("solver", solver_names())
def test_the_bank(solver, case, dtype):
    outcomes: dict[str, FixedPoint] = {}
    for scope, active_set in MODES[dtype]:
        result, f, config = _solved(solver, case, dtype, scope, active_set)
        _check_sound(result, f, config, case, dtype)
        _check_status(result, case, solver, config, dtype)
        first = outcomes.setdefault(scope, result)
        assert torch.equal(result.status, first.status)
        assert torch.equal(result.lane_nfe, first.lane_nfe)
        assert torch.allclose(result.state.double(), first.state.double(), rtol=1e-6, atol=1e-9)


def test_the_bank_holds_every_solver_and_the_maps_differ():
    assert set(solver_names()) >= {"anderson", "broyden", "picard"}
    assert len({case.name for case in CASES}) == len(CASES) >= 17
    for case in CASES:
        fz = case.make(torch.float64)(case.z0)
        assert fz.shape == case.z0.shape == (2, 3, case.z0.shape[-1])
        if case.solution is not None and case.spoilt is None:
            assert torch.allclose(case.make(torch.float64)(case.solution), case.solution, rtol=1e-9)
