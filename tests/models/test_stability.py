"""The Jacobian penalty and the block radii that a model hands to the criterion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import builders
from models.builders import tokens

from fairseq_deq.errors import OptionError
from fairseq_deq.jacobian import jacobian_penalty, spectral_radius
from fairseq_deq.models.stability import PositionSpectralRadii
from fairseq_deq.solvers import Restrictable

# What is asserted here holds at any state: a few evaluations will do.
QUICK = {"f_thres": 4, "b_thres": 4, "keep_converged": 0.0}


def build(**options: Any):
    """A Transformer that is solved in a few evaluations."""
    return builders.build(**(QUICK | options))


BUILDERS = {
    "post-norm": build,
    "pre-norm": lambda **o: build(decoder_normalize_before="true", **o),
    "weight norm": lambda **o: build(wnorm="true", **o),
    "trellis": lambda **o: builders.build_trellis(**QUICK, gradient="jfb", **o),
}


def _term(model, source):
    return model(source)[1]["jacobian_penalty"]


@pytest.mark.parametrize("subseq_len", [0, 3])
@pytest.mark.parametrize("builder", BUILDERS)
def test_the_term_is_the_penalty_at_every_equilibrium_and_has_a_gradient(builder, subseq_len):
    model = BUILDERS[builder](jac_loss_weight=0.5, subseq_len=subseq_len).train()
    source = tokens(2, 8)
    _, extra = model(source)
    term, taped = extra["jacobian_penalty"], [e.taped for e in extra["equilibria"]]
    assert len(taped) == (3 if subseq_len else 1)
    # Draws after draws: the term again, from the same state of the generator.
    torch.manual_seed(4)
    again = type(term).of(extra["equilibria"], source.ne(1), 0.5)
    torch.manual_seed(4)
    expected = sum(jacobian_penalty(fz, z) * fz.shape[1] for fz, z in taped) / 8
    assert torch.allclose(again.value, expected, rtol=1e-12)
    assert again.positions == term.positions == 16
    assert torch.allclose(again.weighted, 0.5 * expected)
    again.value.backward()
    gradients = {n: p.grad for n, p in model.decoder.layer.named_parameters() if p.grad is not None}
    assert any(g.norm() > 1e-6 for g in gradients.values())
    assert all(torch.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("gradient", ["ift", "shine", "phantom", "jfb"])
def test_every_gradient_at_an_equilibrium_can_have_the_penalty(gradient):
    model = build(jac_loss_weight=0.5, gradient=gradient).train()
    x, extra = model(tokens(2, 6))
    (x.pow(2).mean() + extra["jacobian_penalty"].weighted).backward()
    found = model.decoder.layer.qkv.weight_v.grad.clone()
    model.zero_grad()
    x, _ = model(tokens(2, 6))
    x.pow(2).mean().backward()
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, model.decoder.layer.qkv.weight_v.grad, rtol=1e-3)


def test_padding_does_not_count():
    model = build(jac_loss_weight=0.5).train()
    source = tokens(2, 6)
    source[:, 4:] = 1
    means = []
    for batch in (source, source[:, :4]):
        _, extra = model(batch)
        term, real = extra["jacobian_penalty"], batch.ne(1)
        assert term.positions == 8
        torch.manual_seed(0)
        values = [type(term).of(extra["equilibria"], real, 0.5).value.detach() for _ in range(150)]
        means.append(torch.stack(values).mean().item())
    assert means[0] == pytest.approx(means[1], rel=0.1)
    # Were padding part of the mean, it would be half of what it is.


def test_the_term_follows_the_schedule_and_the_phase():
    model = build(jac_loss_weight=0.5, jac_incremental=10, jac_loss_freq=0.5, pretrain_steps=20).train()
    weights = []
    for update in range(20, 60):
        model.set_num_updates(update)
        term = _term(model, tokens(1, 4))
        weights.append(0.0 if term is None else term.weight)
    assert 8 < sum(w > 0 for w in weights) < 32
    assert {round(w, 6) for w in weights if w} == {0.5, 0.6, 0.7, 0.8}
    resumed = build(jac_loss_weight=0.5, jac_incremental=10, jac_loss_freq=0.5, pretrain_steps=20).train()
    for update in (41, 50, 59):
        resumed.set_num_updates(update)
        term = _term(resumed, tokens(1, 4))
        assert (0.0 if term is None else term.weight) == weights[update - 20]
    model.set_num_updates(19)
    assert _term(model, tokens(1, 4)) is None


def test_there_is_no_term_in_evaluation_without_gradients_or_unless_asked_for():
    model = build(jac_loss_weight=0.5)
    assert _term(model.eval(), tokens(1, 4)) is None
    with torch.no_grad():
        assert _term(model.train(), tokens(1, 4)) is None
    assert _term(build().train(), tokens(1, 4)) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"jac_loss_weight": float("nan")}, "--jac-loss-weight must be at least 0, got nan"),
        ({"jac_loss_freq": 1.5}, r"--jac-loss-freq must be in \[0, 1\], got 1.5"),
        ({"jac_incremental": -5}, "--jac-incremental must be at least 0, got -5"),
        ({"jac_incremental": 5, "gradient": "unroll"}, "--jac-incremental needs an equilibrium"),
        ({"spectral_radius": -1}, "--spectral-radius must be in .0, 1000., got -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        build(**options)


# ---------------------------------------------------------------------- block radii


@pytest.mark.parametrize("subseq_len", [0, 3])
@pytest.mark.parametrize("builder", BUILDERS)
@torch.no_grad()
def test_the_largest_radius_of_a_row_is_that_of_its_blocks(builder, subseq_len):
    model = BUILDERS[builder](spectral_radius=60, subseq_len=subseq_len)
    source = tokens(3, 8)
    source[1, 5:] = 1
    source[2] = 1
    radii = model(source)[1]["spectral_radii"]
    largest = radii.largest()
    every = torch.cat([spectral_radius(f, state, steps=60).value for f, state in radii.solved], 1)
    if subseq_len:  # 3 subsequences, 2 positions of each: its first and its last one
        expected = torch.stack([every[0, [0, 2, 3, 5, 6, 7]].max(), every[1, [0, 2, 3, 4]].max()])
    else:
        expected = torch.stack([every[0].max(), every[1, :5].max()])
    assert torch.allclose(largest[:2], expected, rtol=1e-6)
    assert largest[2] == 0


@torch.no_grad()
def test_of_a_long_row_eight_positions_are_looked_at():
    model = build(spectral_radius=16)
    radii = model(tokens(2, 64))[1]["spectral_radii"]
    ((f, state),) = radii.solved
    seen = []

    class Watched:
        def __call__(self, z):
            return f(z)

        def restrict(self, z, positions, value):
            seen.append(positions.tolist())
            return f.restrict(z, positions, value)

    type(radii)([(Watched(), state)], radii.real, radii.steps).largest()
    assert seen == [[t, 64 + t] for t in (0, 9, 18, 27, 36, 45, 54, 63)]


def test_radii_are_for_evaluation_at_an_equilibrium_only():
    model = build(spectral_radius=10, pretrain_steps=5)
    model.set_num_updates(3)
    assert model(tokens(1, 4))[1]["spectral_radii"] is None
    model.set_num_updates(9)
    assert model(tokens(1, 4))[1]["spectral_radii"] is not None
    assert model.train()(tokens(1, 4))[1]["spectral_radii"] is None
    assert build()(tokens(1, 4))[1]["spectral_radii"] is None


def test_radii_of_a_layer_that_cannot_be_restricted_are_those_of_one_that_can():
    model = build(spectral_radius=6).eval()
    _, extra = model(tokens(2, 6))
    radii = extra["spectral_radii"]
    whole = [(lambda z, f=f: f(z), state) for f, state in radii.solved]
    assert not isinstance(whole[0][0], Restrictable)
    assert torch.allclose(PositionSpectralRadii(whole, radii.real, 6).largest(), radii.largest(), rtol=1e-6)
