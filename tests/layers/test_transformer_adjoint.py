"""The hand-written transposed Jacobian against autograd, whole and at some positions."""

from __future__ import annotations

import pytest
import torch
from variants import EVERYTHING, VARIANTS, draw_vectors

from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.whole import BoundTransformer
from fairseq_deq.layers.weight_norm import Initializer

B, C, HEADS, D = 3, 12, 2, 6


def _bound(
    length, memory, *, pre_norm=False, dropout=0.0, local_size=0, padded=False, **options
) -> BoundTransformer:
    torch.manual_seed(0)
    cell = TransformerLayer(
        dim=C,
        ffn_dim=20,
        heads=HEADS,
        head_dim=D,
        pre_norm=pre_norm,
        weight_norm=True,
        dropout=dropout,
        attention_dropout=dropout,
        local_size=local_size,
        **options,
    ).double()
    cell.initialize(Initializer("normal", 0.4, 1.0))
    draw_vectors(cell)
    u = torch.randn(B, length, cell.injection_dim, dtype=torch.float64)
    prepared = cell.train().prepare(cell.draw(B, length, memory, u))
    past = None
    if memory:
        states = torch.randn(B, memory, C, dtype=torch.float64)
        injection = torch.randn(B, memory, cell.injection_dim, dtype=torch.float64)
        past = prepared.context(states, injection, None)
    padding = None
    if padded:
        padding = torch.zeros(B, memory + length, dtype=torch.bool)
        padding[1, memory : memory + 2] = True
    return prepared.bind(u, past, padding)


def _vectors(length: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, length, C, generator=generator, dtype=torch.float64) for _ in range(count)]


CASES = [
    {"length": 6, "memory": 5},
    {"length": 6, "memory": 5, "dropout": 0.3},
    {"length": 24, "memory": 16, "pre_norm": True, "dropout": 0.3},
    {"length": 16, "memory": 0, "pre_norm": True},
    {"length": 9, "memory": 3, "pre_norm": True, "closing_norm": False, "dropout": 0.3},
    {"length": 16, "memory": 0, "local_size": 4},
    {"length": 9, "memory": 3, "padded": True},
    *({"length": 6, "memory": 5} | variant for variant in VARIANTS),
    {"length": 16, "memory": 3, "dropout": 0.3} | EVERYTHING,
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_adjoint_is_that_of_autograd(case):
    f = _bound(**case)
    z, grad, adjoint = _vectors(case["length"], 3)
    leaf = z.clone().requires_grad_()
    (product,) = torch.autograd.grad(f(leaf), leaf, adjoint)
    assert torch.allclose(f.adjoint(z, grad)(adjoint), product + grad, atol=1e-12)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_restricted_it_is_the_whole_one_with_the_others_held(case, known):
    f, n = _bound(**case), B * case["length"]
    z, grad, adjoint, other = _vectors(case["length"], 4)
    whole = f.adjoint(z, grad)
    # Two samples in part, and none of the third.
    positions = torch.arange(1, 2 * n // 3, 2)
    value = whole(adjoint).view(n, C)[positions] if known else None
    part = whole.restrict(adjoint, positions, value)
    rows = other.view(n, C)[positions]
    moved = adjoint.view(n, C).index_copy(0, positions, rows).view_as(adjoint)
    assert torch.allclose(part(rows), whole(moved).view(n, C)[positions], atol=1e-12)


@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_a_sample_has_the_same_adjoint_alone_and_in_a_batch(variant):
    f = _bound(16, 16, **variant)
    z, grad, adjoint = _vectors(16, 3)
    together = f.adjoint(z, grad)(adjoint)
    apart = z + 0.0
    apart[1:] += 1.0
    mates = adjoint.clone()
    mates[1:] *= 7.0
    assert torch.equal(f.adjoint(apart, grad)(mates)[0], together[0])


@pytest.mark.parametrize("variant", [{}, EVERYTHING], ids=str)
def test_the_future_alone_reaches_the_past(variant):
    f = _bound(8, 4, **variant)
    z, grad, adjoint = _vectors(8, 3)
    moved = adjoint.clone()
    moved[:, :5] *= 2.0  # a constant would be lost in the closing LN
    whole = f.adjoint(z, grad)
    assert torch.equal(whole(moved)[:, 5:], whole(adjoint)[:, 5:])
    assert not torch.allclose(whole(moved)[:, :5], whole(adjoint)[:, :5])
