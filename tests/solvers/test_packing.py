"""States of several tensors are solved for as one, and differentiated."""

from __future__ import annotations

import pytest
import torch

from fairseq_deq.implicit import fixed_point
from fairseq_deq.solvers import SolverConfig, StatePacking


def _multiscale(weight: torch.Tensor):
    """A fine image (B, 2, 4, 4) and a coarse one (B, 3), each seeing the other; channels are not last."""
    mix = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).view(3, 2)

    def f(fine: torch.Tensor, coarse: torch.Tensor):
        from_coarse = (coarse @ mix).view(-1, 2, 1, 1)
        return torch.tanh(weight * fine.roll(1, -1) + from_coarse + 0.3), torch.cos(
            fine.mean((2, 3)) @ mix.T + 0.2 * coarse
        )

    return f


def test_two_tensors_are_one_state_with_the_gradient_of_a_long_unroll():
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(5, 2, 4, 4, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    packing = StatePacking.of(start)
    config = SolverConfig(rtol=1e-12, max_evals=100)
    solved = fixed_point(packing.map(_multiscale(weight)), packing.join(start), config)
    fine, coarse = packing.split(solved.state)
    assert fine.shape == (5, 2, 4, 4)
    assert coarse.shape == (5, 3)
    assert solved.result.converged.shape == (5,)
    assert solved.result.converged.all()
    (gradient,) = torch.autograd.grad(fine.square().sum() + coarse.sum(), weight)
    for _ in range(200):
        start = _multiscale(weight)(*start)
    assert torch.allclose(fine, start[0])
    (expected,) = torch.autograd.grad(start[0].square().sum() + start[1].sum(), weight)
    assert torch.allclose(gradient, expected, rtol=1e-6)


def test_numbers_without_axes_are_packed_too():
    packing = StatePacking.of((torch.zeros(3), torch.zeros(3, 2)))
    a, b = packing.split(packing.join((torch.arange(3.0), torch.ones(3, 2))))
    assert a.tolist() == [0, 1, 2]
    assert b.tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ((), "must be tensors"),
        ((1.0, 2.0), "must be tensors"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), "same samples and type, got \\(2, 3\\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double()), "same samples and type"),
    ],
)
def test_what_is_no_state_is_refused_in_a_sentence(state, sentence):
    with pytest.raises(ValueError, match=sentence):
        StatePacking.of(state)


def test_a_map_to_other_shapes_is_refused_in_a_sentence():
    packing = StatePacking.of((torch.zeros(2, 3), torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"f must return tensors of the shapes \[\(3,\), \(4,\)\]"):
        fixed_point(packing.map(lambda a, b: (b, a)), torch.zeros(2, 7))


def test_a_tuple_as_a_start_names_the_packing():
    with pytest.raises(ValueError, match="StatePacking"):
        fixed_point(lambda z: z, (torch.zeros(2, 3), torch.zeros(2, 4)))
