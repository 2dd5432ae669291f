"""The TrellisNet layer against its equations, position by position."""

from __future__ import annotations

import pytest
import torch

from fairseq_deq.layers.trellis.layer import TrellisLayer
from fairseq_deq.layers.trellis.reference import reference
from fairseq_deq.layers.trellis.segment import TrellisMasks
from fairseq_deq.layers.weight_norm import Initializer

B, T, H, OUT = 3, 7, 6, 4
OPTIONS = {"kernel_size": 2, "weight_norm": True, "dropout": 0.0, "weight_dropout": 0.0}
DROPPED = {"dropout": 0.3, "weight_dropout": 0.3}


def _cell(**options) -> TrellisLayer:
    torch.manual_seed(0)
    cell = TrellisLayer(hidden_dim=H, output_dim=OUT, **(OPTIONS | options)).double()
    cell.initialize(Initializer("normal", 0.5, 1.0))
    with torch.no_grad():
        cell.conv.bias.normal_()
    return cell.train()


def _inputs() -> list[torch.Tensor]:
    """States and injections of a segment, and the states before it."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, 2 * H), (B, T, 4 * H), (B, 4, 2 * H))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _padding() -> torch.Tensor:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, :2] = True
    return padding


def _by_hand(prepared, z, u, past, padding=None):
    """f(z) by the equations as they are written."""
    before = 0 if past is None else past.shape[1]
    if past is not None:
        z, u = torch.cat([past, z], 1), torch.cat([u.new_zeros(B, before, 4 * H), u], 1)
        padding = None if padding is None else torch.nn.functional.pad(padding, (before, 0), value=False)
    return reference(z, u, prepared.weights, before, padding)


def test_dropped_taps_are_normalised_row_by_row():
    cell = _cell(kernel_size=3, **DROPPED)
    masks = cell.draw(B, T, 0, torch.zeros(1, dtype=torch.float64))
    taps = cell.prepare(masks).weights.taps
    for r in range(4 * H):
        row = cell.conv.weight_v[r].clone()
        row[: 2 * H] *= masks.weight[r]
        assert torch.allclose(taps[r], cell.conv.weight_g[r] * row / row.norm())


def _bound(cell, u, past=None, padding=None):
    prepared = cell.prepare(cell.draw(B, T, 0, u))
    context = None if past is None else prepared.context(past, past, None)
    return prepared.bind(u, context, padding), prepared


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("before", [None, 1, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_norm": False}, {"kernel_size": 3}, {"kernel_size": 4, **DROPPED}, DROPPED],
    ids=str,
)
def test_f_is_its_definition(options, before, padded):
    cell, (z, u, past) = _cell(**options), _inputs()
    past = None if before is None else past[:, -before:]
    padding = _padding() if padded else None
    f, prepared = _bound(cell, u, past, padding)
    assert torch.allclose(f(z), _by_hand(prepared, z, u, past, padding), atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, **DROPPED}], ids=str)
def test_a_column_is_f_at_one_position_of_every_sample(options):
    cell, (z, u, past) = _cell(**options), _inputs()
    f, _ = _bound(cell, u, past, _padding())
    fz = f(z)
    for t in f.order:
        later = z.clone()
        later[:, t:] = float("nan")  # nothing but its own h may matter from t on
        assert torch.allclose(f.column(later, t)(z[:, t, : f.own]), fz[:, t], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3}, {"kernel_size": 4, **DROPPED}], ids=str)
def test_the_adjoint_is_the_transposed_jacobian(options):
    cell, (z, u, past) = _cell(**options), _inputs()
    f, _ = _bound(cell, u, past, _padding())
    grad, own = torch.randn_like(z), torch.randn(B, T, H, dtype=z.dtype)
    with torch.no_grad():
        adjoint_map = f.adjoint(z, grad)
        adjoint = torch.full_like(z, float("nan"))
        for t in adjoint_map.order:
            adjoint[:, t] = adjoint_map.column(adjoint, t)(own[:, t])
            adjoint[:, t, :H] = own[:, t]
        mapped = [adjoint_map.column(adjoint, t)(own[:, t]) for t in range(T)]
    leaf = z.requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf, adjoint)
    assert torch.allclose(torch.stack(mapped, 1), expected + grad, atol=1e-12)
    assert torch.allclose(adjoint_map(adjoint), expected + grad, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, **DROPPED}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [[0, 3, 6], [7, 8, 9, 13], list(range(21)), [20]], ids=str)
def test_f_at_some_positions_is_f_there_bitwise(rows, dtype, options):
    cell, (z, u, past) = _cell(**options).to(dtype), [x.to(dtype) for x in _inputs()]
    with torch.no_grad():
        f, _ = _bound(cell, u, past, _padding())
        positions = torch.tensor(rows)
        part = f.restrict(z, positions, None)(z.view(-1, 2 * H)[positions])
        assert torch.equal(part, f(z).view(-1, 2 * H)[positions])


@pytest.mark.parametrize("kernel_size", [2, 4])
@pytest.mark.parametrize("rows", [[2, 5], [3, 4, 5, 9, 14, 15]], ids=str)
def test_f_at_some_positions_holds_the_others(rows, kernel_size):
    cell, (z, u, past) = _cell(kernel_size=kernel_size), _inputs()
    f, _ = _bound(cell, u, past)
    positions = torch.tensor(rows)
    moved_rows = z.view(-1, 2 * H)[positions] + 1.0
    moved = z.view(-1, 2 * H).index_copy(0, positions, moved_rows).view_as(z)
    expected = f(moved).view(-1, 2 * H)[positions]
    assert torch.allclose(f.restrict(z, positions, None)(moved_rows), expected, atol=1e-12)


def test_the_weight_is_normalised_once_a_forward_pass(monkeypatch):
    calls = []
    real = torch._weight_norm
    monkeypatch.setattr(torch, "_weight_norm", lambda *a: calls.append(1) or real(*a))
    cell, (z, u, past) = _cell(**DROPPED), _inputs()
    f, _ = _bound(cell, u, past)
    for _ in range(3):
        z = f(z)
    assert len(calls) == 1


def test_masks_drop_channels_of_a_sample_for_all_positions_and_weights_of_the_past_only():
    cell = _cell(kernel_size=3, dropout=0.5, weight_dropout=0.5)
    masks = cell.draw(B, T, 0, torch.zeros(1, dtype=torch.float64))
    assert masks.hidden.shape == (B, 1, H)
    assert not torch.equal(masks.hidden[0], masks.hidden[1])
    taps, whole = cell.prepare(masks).weights.taps, cell.conv.weight()
    zeros = taps == 0
    assert 0.4 < zeros[:, : 2 * H].double().mean() < 0.6
    assert not zeros[:, 2 * H :].any()
    # Normalised after weights were dropped: a row keeps its norm.
    assert torch.allclose(taps.norm(dim=1), whole.norm(dim=1))


def test_nothing_is_dropped_in_evaluation():
    masks = _cell(dropout=0.5, weight_dropout=0.5).eval().draw(B, T, 0, torch.zeros(1))
    assert masks == TrellisMasks(None, None)


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_what_is_settled_continues_the_text(kernel_size):
    cell, (z, u, past) = _cell(kernel_size=kernel_size), _inputs()
    prepared = cell.prepare(cell.draw(B, T, 0, u))
    whole = prepared.bind(u, prepared.context(past, past, None))(z)
    cut = prepared.context(past, past, None)
    for start, stop in ((0, 1), (1, 3), (3, T)):
        part = prepared.bind(u[:, start:stop], cut)(z[:, start:stop])
        assert torch.allclose(part, whole[:, start:stop], atol=1e-12)
        cut = prepared.context(z[:, start:stop], u[:, start:stop], cut)
    assert cut.hidden.shape == (B, kernel_size - 1, H)
    assert cut.cell.shape == (B, 1, H)
