"""Random depths of the stack: what they are drawn from, and which the model follows when."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from models.builders import build, tokens

from fairseq_deq.implicit import unroll
from fairseq_deq.models.stack_depth import StackDepth

RANDOM = {"pretrain_steps": 50, "pretrain_layers": 3, "pretrain_random_layers": "true"}


def _layers_of(model, source, most: int = 12) -> int:
    """How often the model applies its layer: told from what comes out."""
    decoder = model.decoder
    with torch.no_grad():
        state = model.extract_features(source)[1]["equilibria"][0].state
        u = decoder.injection(decoder.embed_tokens(source) * decoder.inputs.scale)
        f = decoder.layer.prepare(decoder.layer.draw(*source.shape, 0, u)).bind(u, None)
        z = torch.zeros_like(state)
        (found,) = [n for n in range(most) if torch.allclose(unroll(f, z, n), state, rtol=0, atol=1e-12)]
    return found


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_depths_are_uniform_from_1_to_twice_the_mean_less_1(layers):
    depth = StackDepth(layers, is_random=True, seed=1)
    draws = 400 * depth.most
    counts = Counter(depth.at(update) for update in range(draws))
    assert depth.most == 2 * layers - 1
    assert set(counts) == set(range(1, 2 * layers))
    assert sum(n * count for n, count in counts.items()) / draws == pytest.approx(layers, rel=0.02)
    # 5 standard deviations of a count of 400
    assert all(abs(count - 400) < 100 for count in counts.values())


def test_depths_follow_from_the_seed_and_the_update_alone():
    drawn = [StackDepth(12, is_random=True, seed=7).at(update) for update in range(100)]
    torch.manual_seed(5)
    again = StackDepth(12, is_random=True, seed=7)
    assert [again.at(update) for update in reversed(range(100))] == drawn[::-1]
    others = [StackDepth(12, is_random=True, seed=8).at(update) for update in range(100)]
    # the draws of another seed are neither these nor these some updates later
    for shift in range(10):
        assert sum(a == b for a, b in zip(drawn[shift:], others, strict=False)) < 20
    assert {StackDepth(12, seed=7).at(update) for update in range(100)} == {12}


def test_training_applies_the_layer_as_often_as_is_drawn_and_evaluation_the_mean():
    model, source = build(**RANDOM, seed=4), tokens(2, 8)
    depths = [StackDepth(3, is_random=True, seed=4).at(update) for update in range(6)]
    assert len(set(depths)) > 2
    for update, depth in enumerate(depths):
        model.set_num_updates(update)
        assert _layers_of(model.train(), source) == depth
        assert _layers_of(model.eval(), source) == 3


def test_after_the_pretraining_nothing_is_drawn():
    model = build(**RANDOM | {"pretrain_steps": 3}, seed=4).train()
    model.set_num_updates(3)
    _, extra = model.extract_features(tokens(2, 8))
    assert bool(extra["equilibria"][0].result.converged.all())
