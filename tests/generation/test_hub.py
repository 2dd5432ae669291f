"""The interface from Python, on raw text."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq_deq.errors import OptionError
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
    assert words.perplexity([]) == 1.0


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
