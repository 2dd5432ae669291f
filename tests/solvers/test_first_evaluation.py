"""What is no map of a state to one of its shape is refused in one sentence, at the first evaluation."""

from __future__ import annotations

import pytest
import torch

from fairseq_deq.implicit import GradientConfig, fixed_point
from fairseq_deq.solvers import Preconditioner, SolverConfig, solve

SOLVERS = ("anderson", "broyden", "picard")
SCOPES = ("position", "sample", "batch")


def _in_place(z):
    return z.mul_(0.5)


def _in_place_and_a_copy(z):
    z += 1.0
    return z.clone()


WRONG = [
    (lambda z: (z, None), "f returned tuple, and a tensor is needed"),
    (lambda z: None, "f returned NoneType, and a tensor is needed"),
    (lambda z: z.numpy(), "f returned ndarray, and a tensor is needed"),
    (lambda z: z[:, :1], r"f made \(2, 1, 4\) out of \(2, 3, 4\), and the shape must stay the same"),
    (lambda z: z.flatten(1), r"f made \(2, 12\) out of \(2, 3, 4\)"),
    (lambda z: z.mean(), r"f made \(\) out of \(2, 3, 4\)"),
    (lambda z: z.long(), "f returned torch.int64 on cpu, and floating point on cpu is needed"),
    (lambda z: z > 0, "f returned torch.bool on cpu"),
    (lambda z: torch.empty(z.shape, device="meta"), "f returned torch.float32 on meta"),
    (_in_place, "f changed z in place, and must leave it as it is"),
    (_in_place_and_a_copy, "f changed z in place"),
]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("f", "sentence"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_map_is_refused_in_words(f, sentence, scope):
    with pytest.raises(ValueError, match=sentence):
        solve(f, torch.zeros(2, 3, 4), SolverConfig(scope=scope))


@pytest.mark.parametrize(("f", "sentence"), WRONG[:5], ids=range(5))
def test_so_it_is_in_a_layer(f, sentence):
    solver = SolverConfig(max_evals=3)
    with pytest.raises(ValueError, match=sentence):
        fixed_point(f, torch.zeros(2, 3, 4), solver, GradientConfig(solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_precision_of_f_is_taken_into_that_of_the_state(solver):
    result = solve(
        lambda z: (0.5 * z + 1.0).bfloat16(), torch.zeros(2, 3, 4), SolverConfig(solver, rtol=1e-2)
    )
    assert result.state.dtype == torch.float32
    assert result.converged.all()


@pytest.mark.parametrize(
    ("z0", "sentence"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.int64), "z0 must be of a floating-point type, got torch.int64"),
        (torch.zeros(2, 3, 4, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(2, 3, 4, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(4), r"z0 needs shape \(samples, ..., C\), got \(4,\)"),
        (torch.tensor(1.0), r"z0 needs shape"),
        ([[0.0, 1.0]], "z0 must be a tensor .*, got list"),
    ],
    ids=str,
)
def test_what_can_be_no_start_is_refused(z0, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve(torch.cos, z0, SolverConfig())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 4)], ids=str)
def test_nothing_is_solved_at_once(shape, scope):
    def f(z):
        raise AssertionError("there is nothing to evaluate")

    p = Preconditioner(torch.ones(4, 1), torch.ones(4, 1))
    z0 = torch.zeros(shape)
    result = solve(f, z0, SolverConfig(scope=scope, policy="raise"), p)
    assert result.state.shape == shape
    assert result.converged.all()
    assert result.nfe == result.total_lane_nfe == 0
    assert result.status.shape == {"position": shape[:-1], "sample": shape[:1], "batch": (1,)}[scope]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_start_is_left_as_it_is(solver):
    z0 = torch.ones(2, 3, 4)
    z0.requires_grad_()
    result = solve(torch.cos, z0, SolverConfig(solver))
    assert torch.equal(z0, torch.ones(2, 3, 4))
    assert not result.state.requires_grad
    result.state.zero_()  # nobody else's
    assert torch.equal(z0, torch.ones(2, 3, 4))


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_is_for_f_alone(solver, half, preconditioned):
    """Where f has nothing to cast, the solve is bit for bit the one without."""
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    p = Preconditioner.from_jacobian(-0.4 * torch.eye(4), 3) if preconditioned else None
    config, seen = SolverConfig(solver, max_evals=60, rtol=1e-5), set()

    def f(z):
        seen.add(torch.is_autocast_enabled("cpu"))
        return torch.cos(0.7 * z + x)

    plain = solve(f, torch.zeros_like(x), config, p)
    assert seen == {False}
    seen.clear()
    with torch.autocast("cpu", dtype=half):
        cast = solve(f, torch.zeros_like(x), config, p)
    assert seen == {True}
    for name in ("state", "status", "lane_nfe", "residual"):
        assert torch.equal(getattr(cast, name), getattr(plain, name)), name
    assert plain.converged.all()
