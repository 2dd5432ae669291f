"""An exported model with its cache, with padding, and beside any batch mates."""

import pytest
import torch
from export.small import VARIANT, scores, small
from models.builders import tokens
from selection import few_of

from fairseq_deq.export.remote.decoder_deq import TextCache
from fairseq_deq.export.remote.transformer_deq import BoundTransformer

PAD = 1
MODELS = {
    "transformer": ("transformer", {}),
    "pre-norm, local": ("transformer", {"local_size": 4, "decoder_normalize_before": "true"}),
    "transformer with knowledge": ("transformer", {"teach": True}),
    "two layers": ("transformer", {"decoder_layers": 2, "init_std": 0.1}),
    "variant": ("transformer", VARIANT | {"decoder_positions": "rotary", "local_size": 4}),
    "trellisnet": ("trellisnet", {"ksize": 3}),
    "position": ("trellisnet", {"teach": True, "solver_scope": "position", "init_std": 0.1}),
}
# Solved to this in float64, so that what is compared is the equation and not the rounding.
EXACT = {"f_eps": 1e-10, "f_thres": 400}
CLOSE = 2e-6  # the package rounds log-probabilities to float32


@pytest.fixture(scope="module", params=MODELS)
def exact(request, tmp_path_factory):
    """A model in float64 and what an export makes of it; tests only read them."""
    family, options = MODELS[request.param]
    one = small(tmp_path_factory.mktemp("exact"), family, **options | EXACT)
    one.model.double()
    return one, one.exported().double()


@pytest.mark.parametrize(
    ("exact", "steps"),
    few_of((model, steps) for model in MODELS for steps in (range(1, 13), (5, 6, 7, 10))),
    indirect=["exact"],
)
def test_a_text_read_in_parts_scores_as_at_once(exact, steps):
    one, decoder = exact
    source = tokens(3, 13)
    found, cache = scores(decoder, source, steps=steps)
    assert (found - one.log_probs(source)).abs().max() < CLOSE
    assert cache.lengths.tolist() == [13] * 3


@pytest.mark.parametrize(
    ("exact", "side"),
    few_of((model, side) for model in MODELS for side in ("left", "right")),
    indirect=["exact"],
)
def test_padding_on_either_side_changes_nothing(exact, side):
    _, decoder = exact
    lengths = (4, 12, 8)
    texts = [tokens(1, n, seed=n) for n in lengths]
    source = torch.full((3, 12), PAD)
    places = [slice(12 - n, 12) if side == "left" else slice(0, n) for n in lengths]
    for row, place, text in zip(source, places, texts):
        row[place] = text[0]
    real = source.ne(PAD)
    whole, cache = scores(decoder, source, real)
    assert cache.lengths.tolist() == list(lengths)
    assert cache.positions == sum(lengths)
    parts, _ = scores(decoder, source, real, steps=range(4, 12))
    for row, (place, text) in enumerate(zip(places, texts)):
        alone = scores(decoder, text)[0][0]
        assert torch.equal(whole[row, place], alone)
        assert (parts[row, place] - alone).abs().max() < CLOSE


@pytest.mark.parametrize("model", MODELS)
def test_what_stands_before_a_changed_token_is_bitwise_the_same(tmp_path, model):
    family, options = MODELS[model]
    one, source = small(tmp_path, family, **options), tokens(3, 21)
    for budget in (1, 6):
        decoder = one.exported(f_thres=budget)
        before, _ = scores(decoder, source)
        for t in (0, 7, 20):
            changed = source.clone()
            changed[:, t] = (changed[:, t] - 3) % 48 + 4
            after, _ = scores(decoder, changed)
            assert torch.equal(after[:, :t], before[:, :t]), budget
            assert budget == 1 or not torch.equal(after[:, t], before[:, t])


def test_beams_take_their_rows_along(exact):
    _, decoder = exact
    source, order = tokens(3, 12), torch.tensor([2, 0, 0])
    cache = TextCache(decoder, 3, decoder.injection.weight)
    real = torch.ones_like(source, dtype=torch.bool)
    with torch.no_grad():
        decoder.extract(source[:, :8], real[:, :8], cache)
        cache.reorder_cache(order)
        source = torch.cat([source.index_select(0, order)[:, :8], tokens(3, 4, seed=7)], 1)
        last = [decoder.extract(source[:, t : t + 1], real[:, :1], cache).features for t in range(8, 12)]
        found = decoder.softmax(torch.cat(last, 1), decoder.embedding).log_softmax(-1)
    assert (found - scores(decoder, source)[0][:, 8:]).abs().max() < CLOSE


def test_a_row_that_has_ended_costs_nothing_and_stays_what_it_was(tmp_path):
    decoder = small(tmp_path, "transformer", **EXACT).exported().double()
    source = tokens(2, 9)
    ended = source.clone()
    ended[0, 6:] = PAD
    found, cache = scores(decoder, ended, steps=range(1, 9))
    expected, whole = scores(decoder, source, steps=range(1, 9))
    assert cache.lengths.tolist() == [6, 9]
    assert cache.evaluations < whole.evaluations
    assert (found[1] - expected[1]).abs().max() < CLOSE
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
def test_a_text_longer_than_a_part_sees_all_before_it(tmp_path, family, monkeypatch):
    one = small(tmp_path, family, **EXACT)
    one.model.double()
    decoder = one.exported().double()
    source = tokens(2, 24)
    monkeypatch.setattr("fairseq_deq.export.remote.decoder_deq.PART", 10)
    found, _ = scores(decoder, source)
    assert (found - one.log_probs(source)).abs().max() < CLOSE


def test_rows_that_have_converged_are_no_longer_evaluated(tmp_path, monkeypatch):
    decoder = small(tmp_path, "transformer", f_eps=1e-4).exported()
    evaluated = []
    call = BoundTransformer.__call__

    def counted(self, z):
        evaluated.append(z.shape[0] * z.shape[1])
        return call(self, z)

    monkeypatch.setattr(BoundTransformer, "__call__", counted)
    source = tokens(6, 32)
    found, _ = scores(decoder, source)
    assert sum(evaluated) < 0.8 * len(evaluated) * source.numel()
    assert max(evaluated) == source.numel()
    monkeypatch.setattr("fairseq_deq.export.remote.solve_deq.NARROW", 0.0)
    evaluated.clear()
    assert torch.equal(found, scores(decoder, source)[0])
    assert set(evaluated) == {source.numel()}
