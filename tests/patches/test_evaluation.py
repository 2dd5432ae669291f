"""The perplexity of a text is that of the whole text, in its order, or there is none."""

import argparse
import math

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.sequence_scorer import SequenceScorer

from fairseq_deq.errors import OptionError
from fairseq_deq.tasks._careful import CarefulTask


def perplexity(output):
    return output.text.rpartition("Loss (base 2): ")[2].split()[0]


class Positions:
    """A data set of blocks of 4 and 9 tokens."""

    sizes = np.array([4, 9])

    def filter_indices_by_size(self, indices, max_positions):
        keep = self.sizes[indices] <= max_positions
        return indices[keep], indices[~keep].tolist()


def kept(limit, **options):
    task = CarefulTask(argparse.Namespace(**options))
    return task.filter_indices_by_size(np.arange(2), Positions(), limit, ignore_invalid_inputs=True).tolist()


def test_blocks_longer_than_the_model_are_refused(refused, data_bin, tiny_checkpoint):
    options = ("--path", tiny_checkpoint, "--cpu", "--num-workers", "0")
    sentence = refused("fairseq-eval-lm", data_bin, *options).text
    assert "--tokens-per-sample 32 or less instead of 1024" in sentence


def test_one_block_left_out_is_refused():
    with pytest.raises(OptionError, match="1 of 2 blocks"):
        kept(5, tokens_per_sample=9)


def test_some_sentences_may_be_left_out():
    assert kept(5, tokens_per_sample=9, sample_break_mode="eos") == [0]


def test_leaving_all_sentences_out_is_refused():
    with pytest.raises(OptionError, match="2 of 2 blocks"):
        kept(3, tokens_per_sample=9, sample_break_mode="eos")


def test_nothing_left_out_is_as_before():
    assert kept(9, tokens_per_sample=9) == [0, 1]


def test_nan_scores_give_no_perplexity(refused, data_bin, tiny_checkpoint, evaluation, tmp_path):
    state = torch.load(tiny_checkpoint, weights_only=False)
    # finite, as only finite weights are loaded; their products are not
    state["model"]["decoder.output_projection.weight"][4] = 3e38
    state["model"]["decoder.output_projection.weight"][5] = -3e38
    torch.save(state, tmp_path / "huge.pt")
    sentence = refused("fairseq-eval-lm", data_bin, "--path", tmp_path / "huge.pt", *evaluation).text
    assert "tokens of a batch got a score that is not finite" in sentence


class Certain(torch.nn.Module):
    """Gives the token 5 the probability 1, and every other none."""

    def forward(self, src_tokens):
        return (src_tokens.unsqueeze(-1),)

    def get_normalized_probs(self, output, log_probs, sample):
        return torch.full((*output[0].shape[:2], 8), -math.inf).index_fill(2, torch.tensor([5]), 0.0)


def score(*target):
    tokens = torch.tensor([target])
    sample = {"id": torch.tensor([0]), "net_input": {"src_tokens": tokens}, "target": tokens}
    return SequenceScorer(Dictionary(), compute_alignment=False).generate([Certain()], sample)


def test_a_token_of_probability_zero_gives_no_perplexity():
    with pytest.raises(OptionError, match=r"1 of 3 tokens .* in block 0"):
        score(5, 6, 5)


def test_finite_scores_are_as_before():
    assert score(5, 5)[0][0]["positional_scores"].tolist() == [0.0, 0.0]


@pytest.fixture
def windows(in_process, data_bin, tiny_checkpoint, evaluation):
    """Evaluates with a context window and the options given."""
    options = ("--path", tiny_checkpoint, *evaluation, "--context-window", "16", "--batch-size", "1")
    return lambda *more: perplexity(in_process("fairseq-eval-lm", data_bin, *options, *more))


def test_workers_do_not_change_the_context_of_a_block(windows):
    assert windows("--num-workers", "2") == windows("--num-workers", "0")


def test_shards_of_a_text_have_no_context(refused, data_bin, tiny_checkpoint, evaluation):
    options = ("--path", tiny_checkpoint, *evaluation, "--context-window", "16", "--num-shards", "2")
    assert "--num-shards" in refused("fairseq-eval-lm", data_bin, *options).text
