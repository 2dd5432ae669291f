"""The trajectory of a solve can be had, and looking on changes nothing."""

from __future__ import annotations

import pytest
import torch
from bound_layers import FAMILIES, B, T

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.solvers import SolverConfig, solve


@pytest.mark.parametrize("active_set", ["never", "always"])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_it_is_every_state_that_f_is_evaluated_at(family, solver, active_set):
    f = family.binds[1](family.injection(torch.float64))
    z0 = torch.zeros(B, T, family.state_dim, dtype=torch.float64)
    config = SolverConfig(solver=solver, rtol=1e-6, max_evals=60, active_set=active_set)
    seen: list[tuple[int, torch.Tensor]] = []
    result = solve(f, z0, config, trace=lambda nfe, state: seen.append((nfe, state)))
    plain = solve(f, z0, config)
    assert torch.equal(result.state, plain.state)
    assert torch.equal(result.lane_nfe, plain.lane_nfe)
    assert [nfe for nfe, _ in seen] == list(range(result.nfe))
    assert torch.equal(seen[0][1], z0)
    if active_set == "never":
        called: list[torch.Tensor] = []

        class Spied:
            direction = f.direction

            def __call__(self, z: torch.Tensor) -> torch.Tensor:
                called.append(z.clone())
                return f(z)

        solve(Spied(), z0, config)
        assert all(torch.equal(state, z) for (_, state), z in zip(seen, called, strict=True))


def test_fixed_point_hands_it_on():
    seen = []
    solved = fixed_point(torch.cos, torch.zeros(2, 3), trace=lambda nfe, state: seen.append(state))
    assert len(seen) == solved.result.nfe > 3
    assert seen[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"solver": SolverConfig(solver="gmres", scope="sample")}, "trace cannot follow solver gmres"),
        ({"gradient": GradientConfig("unroll")}, "trace cannot follow gradient unroll"),
        ({"solver": SolverConfig(scope="recurrence")}, "in scope recurrence"),
    ],
    ids=str,
)
def test_where_it_cannot_be_had_a_sentence_says_so(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fixed_point(torch.cos, torch.zeros(2, 3), **options, trace=print)
