"""No batch is lost to `--required-batch-size-multiple`."""

import itertools

import numpy as np
import pytest
from fairseq.data import data_utils


def batches(count, **options):
    found = data_utils.batch_by_size(np.arange(count), lambda i: 3, required_batch_size_multiple=8, **options)
    return [batch.tolist() for batch in found]


@pytest.mark.parametrize("limit", [{"max_sentences": 8}, {"max_sentences": 4}, {"max_tokens": 24}])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
def test_every_block_is_in_one_batch(count, limit):
    assert sorted(itertools.chain(*batches(count, **limit))) == list(range(count))


def test_blocks_keep_their_order():
    assert batches(10, max_sentences=8) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9]]


def test_whole_batches_stay_as_they_are():
    assert batches(16, max_sentences=8) == [list(range(8)), list(range(8, 16))]


def test_validation_counts_every_token(in_process, data_bin, tiny_checkpoint, evaluation):
    options = (data_bin, "--path", tiny_checkpoint, *evaluation)
    validated = in_process("fairseq-validate", *options, "--batch-size", "4", "--log-format", "json").text
    evaluated = in_process("fairseq-eval-lm", *options, "--gen-subset", "valid").text
    # the mean loss of all tokens; without the last blocks it is another one
    loss = float(validated.rpartition('"valid_loss": "')[2].partition('"')[0])
    assert loss == pytest.approx(float(evaluated.rpartition("(base 2): ")[2].partition(",")[0]), abs=1e-3)
