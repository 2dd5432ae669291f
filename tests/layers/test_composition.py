"""f of several layers against the equations of each, one after another."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from variants import EVERYTHING, draw_vectors

from fairseq_deq.adjoint import HasAdjoint
from fairseq_deq.layers.check import assert_layer_is_sound
from fairseq_deq.layers.composition import Composition, PreparedComposition, compose
from fairseq_deq.layers.layer import Layer, PreparedLayer, recorded
from fairseq_deq.layers.transformer.layer import PreparedTransformer, TransformerLayer
from fairseq_deq.layers.transformer.reference import reference
from fairseq_deq.layers.trellis.layer import TrellisLayer
from fairseq_deq.layers.weight_norm import Initializer
from fairseq_deq.solvers import Restrictable, direction_of

B, T, M, C, HEADS, D = 3, 7, 5, 12, 2, 4
WIDTH = 3 * HEADS * D
OPTIONS = {"dropout": 0.0, "attention_dropout": 0.0, "local_size": 0, "weight_norm": True, "pre_norm": False}
FORMS = [
    {},
    {"pre_norm": True},
    {"weight_norm": False, "local_size": 4},
    {"dropout": 0.3, "attention_dropout": 0.3},
    EVERYTHING | {"pre_norm": True},
]


def _composition(layers: int = 3, **options) -> Composition:
    torch.manual_seed(0)
    cells: list[Layer] = [
        TransformerLayer(dim=C, ffn_dim=20, heads=HEADS, head_dim=D, **(OPTIONS | options))
        for _ in range(layers)
    ]
    composition = Composition(cells).double()
    composition.initialize(Initializer("normal", 0.4, 1.0))
    draw_vectors(composition)
    return composition


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _prepared(composition: Composition, length: int, memory: int) -> PreparedComposition:
    like = torch.zeros((), dtype=torch.float64)
    return composition.prepare(composition.draw(B, length, memory, like))


def _by_hand(
    prepared: PreparedComposition, z: Tensor, u: Tensor, past: list[Tensor], padding: Tensor | None = None
) -> Tensor:
    """f(z) by the equations of each layer, where `past` is what each was given at the positions before.

    Args:
        u: injections of the positions before and of the segment, (B, M + T, N*D).
    """
    for part, injection, before in zip(prepared.parts, u.chunk(len(past), -1), past):
        assert isinstance(part, PreparedTransformer)
        z = reference(torch.cat([before, z], 1), injection, part.weights, before.shape[1], padding)
    return z


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_f_is_one_layer_after_another(options, layers):
    composition = _composition(layers, **options).train()
    prepared = _prepared(composition, T, M)
    z, u, past = (
        _draw(B, T, C, seed=1),
        _draw(B, M + T, composition.injection_dim, seed=2),
        _draw(B, M, layers * C, seed=3),
    )
    f = prepared.bind(u[:, M:], prepared.context(past, u[:, :M], None))
    assert torch.allclose(f(z), _by_hand(prepared, z, u, list(past.chunk(layers, -1))), atol=1e-12)


def test_padding_is_not_attended_to_in_any_layer():
    prepared = _prepared(_composition(), T, M)
    z, u, past = _draw(B, T, C, seed=1), _draw(B, M + T, 3 * WIDTH, seed=2), _draw(B, M, 3 * C, seed=3)
    padding = torch.zeros(B, M + T, dtype=torch.bool)
    padding[1, 2:6] = True
    f = prepared.bind(u[:, M:], prepared.context(past, u[:, :M], None), padding)
    expected = _by_hand(prepared, z, u, list(past.chunk(3, -1)), padding)
    assert torch.allclose(f(z), expected, atol=1e-12)
    assert not torch.allclose(f(z)[1], _by_hand(prepared, z, u, list(past.chunk(3, -1)))[1], atol=1e-3)


@pytest.mark.parametrize("options", FORMS[:2], ids=str)
def test_the_record_is_what_each_layer_was_given(options):
    prepared = _prepared(_composition(**options), T, 0)
    z, u = _draw(B, T, C, seed=1), _draw(B, T, 3 * WIDTH, seed=2)
    record = recorded(prepared.bind(u, None), z)
    nothing = z[:, :0]
    second = _by_hand(prepared, z, u[..., :WIDTH], [nothing])
    third = _by_hand(prepared, z, u[..., : 2 * WIDTH], [nothing, nothing])
    assert torch.allclose(record, torch.cat([z, second, third], -1), atol=1e-12)


@pytest.mark.parametrize("cut", [1, 4, 6])
@pytest.mark.parametrize("options", [*FORMS[:3], FORMS[4]], ids=str)
def test_a_segment_after_its_beginning_is_the_whole(options, cut):
    """One context after another, and a cache: what each layer was given is all that later positions need."""
    composition = _composition(**options)
    prepared = _prepared(composition, T, 0)
    z, u = _draw(B, T, C, seed=1), _draw(B, T, composition.injection_dim, seed=2)
    whole = prepared.bind(u, None)
    expected, record = whole(z), recorded(whole, z)
    parts = [slice(0, cut), slice(cut, T - 1), slice(T - 1, T)]
    context, cache = None, prepared.new_cache(B)
    for part in parts:
        if part.start == part.stop:
            continue
        f, g = prepared.bind(u[:, part], context), cache.bind(u[:, part], None)
        assert torch.allclose(f(z[:, part]), expected[:, part], atol=1e-12)
        assert torch.allclose(g(z[:, part]), expected[:, part], atol=1e-12)
        assert torch.allclose(recorded(f, z[:, part]), record[:, part], atol=1e-12)
        assert torch.allclose(recorded(g, z[:, part]), record[:, part], atol=1e-12)
        context = prepared.context(record[:, part], u[:, part], context)
        cache.append(record[:, part], u[:, part])
    assert cache.length == T
    assert cache.nbytes == 3 * _cache_of_one(T).nbytes


def _cache_of_one(length: int):
    """The cache of one layer after `length` positions."""
    layer = _composition(1).parts[0]
    prepared = layer.prepare(layer.draw(B, length, 0, torch.zeros((), dtype=torch.float64)))
    cache = prepared.new_cache(B)
    cache.append(_draw(B, length, C, seed=1), _draw(B, length, WIDTH, seed=2))
    return cache


def test_rows_of_context_and_cache_follow_their_texts():
    prepared = _prepared(_composition(), 1, M)
    z, u, past = _draw(B, 1, C, seed=1), _draw(B, M + 1, 3 * WIDTH, seed=2), _draw(B, M, 3 * C, seed=3)
    order = torch.tensor([2, 0, 2])
    cache = prepared.new_cache(B)
    cache.append(past, u[:, :M])
    cache.reorder(order)
    context = prepared.context(past, u[:, :M], None)
    expected = prepared.bind(u[:, M:], context)(z)[order]
    assert torch.allclose(prepared.bind(u[order, M:], context.rows(order))(z[order]), expected, atol=1e-12)
    assert torch.allclose(cache.bind(u[order, M:], None)(z[order]), expected, atol=1e-12)


@pytest.mark.parametrize("options", [*FORMS[:2], *FORMS[3:]], ids=str)
def test_its_adjoint_is_that_of_autograd(options):
    composition = _composition(**options).train()
    prepared = _prepared(composition, T, M)
    z, past = _draw(B, T, C, seed=1), _draw(B, M, 3 * C, seed=3)
    u = _draw(B, M + T, composition.injection_dim, seed=2)
    f = prepared.bind(u[:, M:], prepared.context(past, u[:, :M], None))
    assert isinstance(f, HasAdjoint)
    vector, grad = _draw(B, T, C, seed=5), _draw(B, T, C, seed=6)
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.grad(f(leaf), leaf, vector)[0] + grad
    adjoint = f.adjoint(z, grad)
    assert (direction_of(f), direction_of(adjoint)) == (1, -1)
    assert torch.allclose(adjoint(vector), expected, atol=1e-12)


@pytest.mark.parametrize(
    "make", [_composition, lambda: Composition([_Shift(), _composition(1).parts[0]])], ids=["same", "mixed"]
)
def test_a_composition_is_a_sound_layer(make):
    assert_layer_is_sound(make)


def test_where_one_layer_has_no_adjoint_there_is_none_and_no_order_where_they_differ():
    layer = Composition([_Shift(), _composition(1).parts[0]]).double()
    u = _draw(B, T, C + WIDTH, seed=2)
    f = layer.prepare(layer.draw(B, T, 0, u)).bind(u, None)
    assert direction_of(f) == 0
    assert not isinstance(f, HasAdjoint)


def test_nothing_is_evaluated_at_some_positions_only():
    """With the others' states held, f_1 of a position between two that move would still have to follow."""
    f = _prepared(_composition(), T, 0).bind(_draw(B, T, 3 * WIDTH, seed=2), None)
    assert not isinstance(f, Restrictable)


def test_one_layer_is_itself():
    layer = _composition(1).parts[0]
    assert compose([layer]) is layer
    assert isinstance(compose([layer, layer]), Composition)


def test_sizes_add_up_and_the_furthest_look_back_counts():
    composition = _composition(3)
    assert (composition.state_dim, composition.output_dim) == (C, C)
    assert (composition.injection_dim, composition.record_dim) == (3 * WIDTH, 3 * C)
    near = Composition([_Near(), _composition(1).parts[0]])
    assert near.memory_length(9) == 9
    assert Composition([_Near(), _Near()]).memory_length(9) == 1


class _Shift(Layer):
    """z_t = tanh(z_t + z_{t-1} + u_t), which says nothing of itself."""

    def __init__(self) -> None:
        super().__init__(C, C)

    def prepare(self, masks: None) -> _PreparedShift:
        return _PreparedShift()


class _PreparedShift(PreparedLayer):
    def context(self, record: Tensor, injection: Tensor, context: Tensor | None) -> _Last:
        return _Last(record[:, -1:])

    def bind(self, injection: Tensor, context: _Last | None, padding: Tensor | None = None, start: int = 0):
        before = torch.zeros_like(injection[:, :1]) if context is None else context.state

        def f(z: Tensor) -> Tensor:
            shifted = torch.cat([before, z[:, :-1]], 1)
            if padding is not None:
                hidden = padding[:, -z.shape[1] :].unsqueeze(-1)
                shifted = shifted.masked_fill(torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1], 0.0)
            return torch.tanh(z + shifted + injection)

        return f


@dataclass(frozen=True)
class _Last:
    """The state of the last position, (B, 1, C)."""

    state: Tensor

    def rows(self, index: Tensor) -> _Last:
        return _Last(self.state.index_select(0, index))


class _Near(Layer):
    """A layer that looks back one position."""

    def __init__(self) -> None:
        super().__init__(C, C)

    def memory_length(self, mem_len: int) -> int:
        return min(mem_len, 1)


def test_layers_that_cannot_be_one_f_are_refused():
    with pytest.raises(ValueError, match=r"layers of one f must have the same state_dim, got \[12, 16\]"):
        Composition([_Near(), TrellisLayer(8, 4, 2, False, 0.0, 0.0)])
    with pytest.raises(ValueError, match="f needs at least one layer"):
        Composition([])
