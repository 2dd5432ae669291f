"""The layer against its equations, position by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from variants import EVERYTHING, VARIANTS, draw_vectors

from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.reference import reference
from fairseq_deq.layers.weight_norm import Initializer

B, T, M, C, HEADS, D = 3, 7, 5, 12, 2, 4
OPTIONS = {"dropout": 0.0, "attention_dropout": 0.0, "local_size": 0, "weight_norm": True, "pre_norm": False}


def _cell(**options) -> TransformerLayer:
    torch.manual_seed(0)
    cell = TransformerLayer(dim=C, ffn_dim=20, heads=HEADS, head_dim=D, **(OPTIONS | options)).double()
    cell.initialize(Initializer("normal", 0.4, 1.0))
    draw_vectors(cell)
    return cell


def _inputs(cell):
    """States and injections of a segment, and of the positions before it."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, C), (B, T, cell.injection_dim), (B, M, C), (B, M, cell.injection_dim))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _by_hand(prepared, z, u, past, past_u, padding=None):
    """f(z) by the equations as they are written."""
    whole, whole_u = torch.cat([past, z], 1), torch.cat([past_u, u], 1)
    return reference(whole, whole_u, prepared.weights, past.shape[1], padding)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_norm": True},
        {"pre_norm": True, "closing_norm": False},
        {"weight_norm": False},
        {"local_size": 4},
        {"dropout": 0.3, "attention_dropout": 0.3},
        *VARIANTS,
        EVERYTHING | {"dropout": 0.3},
    ],
    ids=str,
)
def test_f_is_its_definition(options):
    cell = _cell(**options).train()
    (z, u, past, past_u) = _inputs(cell)
    prepared = cell.prepare(cell.draw(B, T, M, z))
    f = prepared.bind(u, prepared.context(past, past_u, None))
    assert torch.allclose(f(z), _by_hand(prepared, z, u, past, past_u), atol=1e-12)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_padding_is_not_attended_to(options):
    cell = _cell(**options)
    (z, u, past, past_u) = _inputs(cell)
    padding = torch.zeros(B, M + T, dtype=torch.bool)
    padding[1, 2:6] = True
    prepared = cell.prepare(cell.draw(B, T, M, z))
    f = prepared.bind(u, prepared.context(past, past_u, None), padding)
    assert torch.allclose(f(z), _by_hand(prepared, z, u, past, past_u, padding), atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_norm": True},
        {"pre_norm": True, "closing_norm": False},
        {"dropout": 0.3, "attention_dropout": 0.3},
        *VARIANTS[1:],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [[0, 3, 6], [7, 8, 9, 13], list(range(21)), [20]], ids=str)
def test_f_at_some_positions_is_f_there_bitwise(rows, dtype, options):
    cell = _cell(**options).to(dtype).train()
    (z, u, past, past_u) = [x.to(dtype) for x in _inputs(cell)]
    with torch.no_grad():
        prepared = cell.prepare(cell.draw(B, T, M, z))
        f = prepared.bind(u, prepared.context(past, past_u, None))
        positions = torch.tensor(rows)
        part = f.restrict(z, positions, None)(z.view(-1, C)[positions])
        assert torch.equal(part, f(z).view(-1, C)[positions])


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_f_at_some_positions_holds_the_others(options):
    cell = _cell(**options)
    (z, u, _, _) = _inputs(cell)
    f = cell.prepare(cell.draw(B, T, 0, z)).bind(u, None)
    positions = torch.tensor([2, 5])
    rows = z.view(-1, C)[positions] + 1.0
    moved = z.view(-1, C).index_copy(0, positions, rows).view_as(z)
    assert torch.allclose(f.restrict(z, positions, None)(rows), f(moved).view(-1, C)[positions], atol=1e-12)


def test_masks_drop_channels_of_a_sample_for_all_positions():
    masks = _cell(dropout=0.5).train().draw(B, T, M, torch.zeros(1))
    assert masks.hidden.shape == (B, C)
    assert set(masks.hidden.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(masks.hidden[0], masks.hidden[1])


def test_nothing_is_dropped_in_evaluation():
    masks = _cell(dropout=0.5, attention_dropout=0.5).eval().draw(B, T, M, torch.zeros(1))
    assert vars(masks) == dict.fromkeys(vars(masks))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
@pytest.mark.parametrize("place", ["hidden", "ffn_inner", "ffn_outer"])
def test_a_dropped_channel_is_dropped_at_every_position_of_every_evaluation(place, options):
    cell = _cell(**options)
    (z, u, _, _) = _inputs(cell)
    mask = torch.ones(B, {"hidden": C, "ffn_inner": 20, "ffn_outer": C}[place], dtype=z.dtype)
    mask[1, 3] = 0.0
    masks = replace(cell.draw(B, T, 0, z), **{place: mask})
    f = cell.prepare(masks).bind(u, None)
    whole = cell.prepare(cell.draw(B, T, 0, z)).bind(u, None)
    assert torch.equal(f(z), f(z))
    changed = (f(z) != whole(z)).any(-1)
    assert not changed[[0, 2]].any()
    # A channel of the rectifier may be silent at a position anyway.
    assert changed[1].all() or (place == "ffn_inner" and changed[1].any())


@pytest.mark.parametrize("local_size", [1, 3])
def test_local_attention_does_not_see_further_back(local_size):
    cell = _cell(local_size=local_size)
    (z, u, _, _) = _inputs(cell)
    f = cell.prepare(cell.draw(B, T, 0, z)).bind(u, None)
    moved = z.clone()
    moved[:, 0] += 1.0
    changed = (f(moved) != f(z)).any(-1).any(0)
    assert changed.tolist() == [t < local_size for t in range(T)]


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=str)
def test_left_padding_of_any_content_changes_nothing(options):
    cell = _cell(**options)
    (z, u, _, _) = _inputs(cell)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[:, :3] = True
    prepared = cell.prepare(cell.draw(B, T, 0, z))
    other_z, other_u = z.clone(), u.clone()
    other_z[:, :3] += 1.0
    other_u[:, :3] -= 1.0
    a, b = prepared.bind(u, None, padding)(z), prepared.bind(other_u, None, padding)(other_z)
    assert torch.equal(a[:, 3:], b[:, 3:])
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_and_values_of_the_past_are_bitwise_those_of_the_row_alone(dtype):
    cell = _cell().to(dtype)
    (_, _, past, past_u) = [x.to(dtype) for x in _inputs(cell)]
    prepared = cell.prepare(cell.draw(B, T, M, past))
    together, alone = prepared.context(past, past_u, None), prepared.context(past[1:2], past_u[1:2], None)
    assert torch.equal(together.keys[1], alone.keys[0])
    assert torch.equal(together.values[1], alone.values[0])
