"""The interface from Python, on raw text."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fairseq_deq.errors import OptionError
from fairseq_deq.generation import text
from fairseq_deq.generation.scoring import TextScorer
from fairseq_deq.models.deq_transformer_lm import DEQTransformerLanguageModel

SENTENCE = "the people of the United States"


@pytest.fixture(scope="module")
def words(unique_checkpoint, data_bin):
    """A model of whole words, solved until it has converged."""
    return DEQTransformerLanguageModel.from_pretrained(
        str(unique_checkpoint.parent), unique_checkpoint.name, str(data_bin), f_thres=80, f_eps=1e-5
    )


@pytest.fixture(scope="module", params=["sentencepiece", "subword_nmt"])
def cut(request, pieces):
    """A model of pieces."""
    trained = pieces(request.param)
    return DEQTransformerLanguageModel.from_pretrained(
        str(trained.checkpoint.parent), trained.checkpoint.name, str(trained.data), **trained.overrides
    )


def test_scores_are_those_of_fairseq(words):
    (hypothesis,) = words.generate([words.encode(SENTENCE)], score_reference=True)
    score = words.score(SENTENCE)
    # fairseq's scores end before the end of the sentence.
    assert torch.equal(score.tokens[:-1], hypothesis[0]["tokens"])
    assert torch.allclose(score.log_probs[:-1], hypothesis[0]["positional_scores"], atol=1e-3)
    assert torch.allclose(words.score(SENTENCE, eos=False).log_probs, score.log_probs[:-1], atol=1e-3)


def test_a_score_is_the_same_in_any_batch(words):
    sentences = ["the", SENTENCE, "", "of the of the of the of"]
    together = words.score(sentences)
    assert [score.text for score in together] == sentences
    for sentence, score in zip(sentences, together):
        alone = words.score(sentence)
        assert torch.allclose(alone.log_probs, score.log_probs, atol=1e-3)
    assert together[2].pieces == ["</s>"]


def test_perplexity_is_over_all_tokens(words):
    sentences = ["the people", SENTENCE]
    scores = words.score(sentences)
    total, count = sum(s.log_prob for s in scores), sum(len(s.pieces) for s in scores)
    assert words.perplexity(sentences) == pytest.approx(math.exp(-total / count))
    assert words.perplexity(SENTENCE) == pytest.approx(scores[1].perplexity)
    for nothing in ([], [""]):
        with pytest.raises(OptionError, match="nothing to score"):
            words.perplexity(nothing, eos=False)
    assert words.score([]) == []
    assert math.isnan(words.score("", eos=False).perplexity)


def test_words_add_their_pieces_up_and_read_as_they_were_written(cut):
    score = cut.score(SENTENCE)
    assert [word for word, _ in score.words] == [*SENTENCE.split(), "</s>"]
    assert len(score.pieces) > len(score.words)
    assert sum(value for _, value in score.words) == pytest.approx(score.log_prob, abs=1e-4)
    assert score.log_probs.numel() == len(score.pieces) == score.tokens.numel()


def test_samples_begin_with_their_prompts_and_depend_on_the_seed_alone(cut):
    options = {"sampling": True, "sampling_topk": 10, "max_len_b": 12}
    one = cut.sample([SENTENCE, "the"], seed=5, **options)
    assert cut.sample([SENTENCE, "the"], seed=5, **options) == one
    assert any(cut.sample([SENTENCE, "the"], seed=seed, **options) != one for seed in (6, 7, 8))
    assert one[0].startswith(SENTENCE)
    assert one[1].startswith("the")


def test_a_prompt_may_be_longer_than_two_hundred_tokens_or_empty(words):
    prompt = " ".join(["the"] * 250)
    found = words.sample(prompt, max_len_b=4)
    assert found.startswith(prompt)
    assert len(found.split()) > 250
    assert isinstance(words.sample("", max_len_b=4), str)


def test_a_misspelt_option_is_named(words, deq_checkpoint, data_bin):
    with pytest.raises(OptionError, match="no option tempratre"):
        words.sample("the", tempratre=2.0)
    with pytest.raises(OptionError, match="f_epss"):
        DEQTransformerLanguageModel.from_pretrained(
            str(deq_checkpoint.parent), deq_checkpoint.name, str(data_bin), f_epss=1e-4
        )
    with pytest.raises(OptionError, match=r"no checkpoint .*nowhere\.pt"):
        DEQTransformerLanguageModel.from_pretrained(str(deq_checkpoint.parent), "nowhere.pt", str(data_bin))


@pytest.mark.parametrize("beam", [1, 3])
def test_each_prompt_gets_as_many_new_tokens_alone_as_in_a_batch(words, beam):
    prompts = ["the", "the people of the United States , and of the Union", "", "we the people"]
    tokens = [words.encode(prompt) for prompt in prompts]
    options = {"max_len_a": 1, "max_len_b": 5, "min_len": 1, "unk_penalty": 1.0}
    together = words.generate(tokens, beam=beam, **options)
    for prompt, hypotheses in zip(tokens, together):
        (alone,) = words.generate([prompt], beam=beam, **options)
        assert len(hypotheses) == len(alone) == beam
        for one, other in zip(hypotheses, alone):
            assert torch.equal(one["tokens"], other["tokens"])
            assert torch.allclose(one["positional_scores"], other["positional_scores"], atol=2e-3)
            # the tokens of the prompt and 5 new ones at most, and the end
            assert one["tokens"].numel() <= prompt.numel() - 1 + 5 + 1
    assert any(row[0]["tokens"].numel() == p.numel() - 1 + 6 for row, p in zip(together, tokens))


def test_no_new_tokens_leave_the_prompt(words):
    prompts = ["the", "the people of the United States"]
    assert words.sample(prompts, beam=3, max_len_b=0) == prompts
    with pytest.raises(OptionError, match="--min-len 50 is more than"):
        words.sample(prompts, max_len_b=2, min_len=50)


def test_unknown_words_are_counted_marked_and_warned_of(words, caplog):
    score = words.score("the xyzzy people <pad> </s> <unk>")
    # what the text itself calls unknown is in the dictionary
    assert score.unknown == ["xyzzy", "<pad>", "</s>"]
    assert score.unknown_in_words == [0, 1, 0, 1, 1, 0, 0]
    assert score.tokens.tolist()[1] == score.tokens.tolist()[3] == words.src_dict.unk()
    assert score.log_probs.numel() == 7
    assert "3 of 6 words are not in the dictionary: the xyzzy people" in caplog.text
    caplog.clear()
    words.sample("the xyzzy", max_len_b=1)
    assert "1 of 2 words are not in the dictionary: the xyzzy" in caplog.text


def test_what_the_solves_came_to_is_kept_and_warned_of(words, caplog):
    words.score(SENTENCE)
    assert words.solves.lanes == 7
    assert words.solves.share == 1
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    few = words.models[0].decoder
    solver, few.solver = few.solver, dataclasses.replace(few.solver, max_evals=2)
    try:
        words.perplexity(SENTENCE)
        assert words.solves.share < 0.99
        assert "the numbers are not those of the equilibrium" in caplog.text
    finally:
        few.solver = solver


def test_a_layer_that_is_not_finite_gives_neither_score_nor_text(unique_checkpoint, data_bin):
    model = DEQTransformerLanguageModel.from_pretrained(unique_checkpoint, data_name_or_path=data_bin)
    with torch.no_grad():
        model.models[0].decoder.layer.qkv.weight_v[0].fill_(math.nan)
    for call in (model.score, model.sample, model.perplexity):
        with pytest.raises(OptionError, match="not finite"):
            call(SENTENCE)


def test_paths_of_every_kind(unique_checkpoint, data_bin, tmp_path):
    for folder, name in ((unique_checkpoint.parent, unique_checkpoint.name), (unique_checkpoint, "other.pt")):
        model = DEQTransformerLanguageModel.from_pretrained(folder, name, data_bin)
        assert model.sample([]) == []
    with pytest.raises(OptionError, match="there is no folder"):
        DEQTransformerLanguageModel.from_pretrained(tmp_path / "none", "a.pt", data_bin)
    with pytest.raises(OptionError, match="does not exist"):
        DEQTransformerLanguageModel.from_pretrained(unique_checkpoint, data_name_or_path=tmp_path / "none")
    with pytest.raises(OptionError, match="must be a text"):
        model.score([1])


def test_the_tokeniser_comes_from_the_caller(unique_checkpoint, data_bin, tmp_path):
    state = torch.load(unique_checkpoint, weights_only=False)
    state["cfg"]["bpe"] = {"_name": "sentencepiece", "sentencepiece_model": str(tmp_path / "none.model")}
    torch.save(state, tmp_path / "own.pt")
    model = DEQTransformerLanguageModel.from_pretrained(tmp_path / "own.pt", data_name_or_path=data_bin)
    assert model.bpe is None


def test_a_long_text_is_solved_in_parts_that_see_all_before_them(words, monkeypatch):
    decoder = words.models[0].decoder
    long = " ".join(["the people of the United States"] * 6)
    monkeypatch.setattr(decoder, "subseq_len", 1000)
    whole = words.score(long).log_probs
    monkeypatch.setattr(decoder, "subseq_len", 7)
    assert torch.allclose(words.score(long).log_probs, whole, atol=1e-3)


def test_long_texts_have_a_bound(unique_checkpoint, data_bin, monkeypatch):
    model = DEQTransformerLanguageModel.from_pretrained(unique_checkpoint, data_name_or_path=data_bin)
    assert model.models[0].decoder.subseq_len == text._PART
    monkeypatch.setattr(text, "_LONGEST_FOR_A_STACK", 20)
    stack = model.models[0]
    stack.decoder.pretrain_steps, stack.decoder.num_updates = 5, 2
    scorer = TextScorer(model.task, [stack], None, None)
    with pytest.raises(OptionError, match="has 31 tokens, and the model reads at most 20"):
        scorer.score([" ".join(["the"] * 30)])
