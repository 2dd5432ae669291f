"""Streams cover the text once and in order, and the memory goes along from batch to batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models.builders import build

from fairseq_deq.errors import OptionError
from fairseq_deq.layers.memory import Memory, MemoryCarrier
from fairseq_deq.tasks._streams import StreamBatches, StreamIterator, StreamText

EOS, PAD = 2, 1
CPU = torch.device("cpu")
SEED = 1  # of a small model that converges at every token of these texts


def _text(total: int, seed: int = 0) -> StreamText:
    """A text of `total` tokens in sentences of 1 to 9."""
    generator = np.random.default_rng(seed)
    ends = np.cumsum(generator.integers(1, 10, total))
    ends = np.append(ends[ends < total], total)
    tokens = torch.from_numpy(generator.integers(4, 52, total))
    sentences = torch.tensor_split(tokens, [int(end) for end in ends[:-1]])
    return StreamText("made up", sentences, np.array([len(s) for s in sentences]), EOS, PAD)


def _batches(
    text: StreamText, streams: int, block: int, *, first: int = 0, rows: int = 0, whole: bool = False
):
    return StreamBatches(text, streams, first, rows or streams, block, whole)


def _rows(batches: StreamBatches, key: str) -> list[torch.Tensor]:
    """The streams of `source` or `target`, without padding."""
    items = [batches[k] for k in range(len(batches))]
    wide = [item["target"] if key == "target" else item["net_input"]["src_tokens"] for item in items]
    return [torch.cat([block[row] for block in wide]) for row in range(batches.rows)]


# ---------------------------------------------------------------------- the streams


def test_a_span_of_a_text_is_what_its_sentences_hold():
    text = _text(60)
    whole = torch.cat(list(text.sentences))
    assert len(text) == 60
    for start, stop in ((0, 60), (7, 8), (13, 41), (59, 60), (20, 20)):
        assert torch.equal(text.span(start, stop), whole[start:stop])
    assert text.span(-1, 2).tolist() == [EOS, *whole[:2].tolist()]


@pytest.mark.parametrize("block", [1, 7, 32, 500])
@pytest.mark.parametrize("streams", [1, 3, 8, 101, 150])
def test_evaluation_predicts_every_token_once_and_in_order(streams, block):
    text = _text(101)
    batches = _batches(text, streams, block)
    targets = [row[row != PAD] for row in _rows(batches, "target")]
    sources = [row[row != PAD] for row in _rows(batches, "source")]
    whole = text.span(0, 101)
    assert torch.equal(torch.cat(targets), whole)
    assert torch.equal(torch.cat(sources), text.span(-1, 100))
    assert batches.left_out == 0
    assert sum(batches[k]["ntokens"] for k in range(len(batches))) == 101
    assert max(map(len, targets)) - min(map(len, targets)) <= 1
    # only the last batch is padded, so that no memory ever holds padding
    for k in range(len(batches) - 1):
        assert not (batches[k]["target"] == PAD).any()


def test_every_prediction_has_an_id_of_its_own():
    batches = _batches(_text(101), 3, 7)
    ids = torch.cat([batches[k]["id"] for k in range(len(batches))])
    assert ids.tolist() == list(range(3 * len(batches)))


@pytest.mark.parametrize(("streams", "block", "kept"), [(1, 7, 98), (3, 7, 84), (8, 12, 96), (8, 50, 96)])
def test_training_reads_full_blocks_from_the_start_of_the_text(streams, block, kept):
    text = _text(101)
    batches = _batches(text, streams, block, whole=True)
    assert torch.equal(torch.cat(_rows(batches, "target")), text.span(0, kept))
    assert torch.equal(torch.cat(_rows(batches, "source")), text.span(-1, kept - 1))
    assert batches.left_out == 101 - kept


def test_a_text_of_fewer_tokens_than_streams_cannot_be_trained_on():
    with pytest.raises(OptionError, match=r"'made up' has 5 tokens for 8 streams.*--batch-size"):
        _batches(_text(5), 8, 4, whole=True)


@pytest.mark.parametrize("whole", [True, False])
def test_two_processes_have_the_rows_of_one(whole):
    text = _text(103)
    together = _batches(text, 6, 8, whole=whole)
    parts = [_batches(text, 6, 8, first=first, rows=3, whole=whole) for first in (0, 3)]
    assert {len(part) for part in parts} == {len(together)}
    for k in range(len(together)):
        halves = [part[k] for part in parts]
        assert torch.equal(torch.cat([half["target"] for half in halves]), together[k]["target"])
        assert torch.equal(torch.cat([half["id"] for half in halves]), together[k]["id"])
        sources = [half["net_input"]["src_tokens"] for half in halves]
        assert torch.equal(torch.cat(sources), together[k]["net_input"]["src_tokens"])


# ---------------------------------------------------------------------- what carries the memory


def _memory(value: float) -> Memory:
    return Memory(torch.full((1, 1, 1), value), torch.full((1, 1, 1), value))


def _value(memory: Memory | None) -> float | None:
    return None if memory is None else memory.state.item()


def test_batches_fetched_ahead_get_the_memory_of_the_one_before():
    first = MemoryCarrier()
    second = MemoryCarrier(first)
    third = MemoryCarrier(second)
    assert first.before(CPU) is None
    for carrier, before in ((first, None), (second, 1.0), (third, 2.0)):
        assert _value(carrier.before(CPU)) == before
        carrier.after = _memory(1.0 if before is None else before + 1)


def test_a_batch_that_is_run_again_starts_from_the_same_memory():
    first = MemoryCarrier(after=_memory(1.0))
    second = MemoryCarrier(first)
    for _ in range(2):
        assert _value(second.before(CPU)) == 1.0
        second.after = _memory(2.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_starts_without_a_memory_and_carries_its_own(workers):
    iterator = StreamIterator(_batches(_text(60), 2, 8, whole=True), 1, workers, buffer_size=2)
    expected = _rows(iterator.batches, "target")
    for _ in range(2):
        before, rows = [], []
        for k, batch in enumerate(iterator.next_epoch_itr()):
            before.append(_value(batch["net_input"]["memory"].before(CPU)))
            batch["net_input"]["memory"].after = _memory(float(k))
            rows.append(batch["target"])
        assert before == [None, 0.0, 1.0]
        assert _value(iterator.memory) == 2.0
        assert torch.equal(torch.cat(rows, 1), torch.stack(expected))


def _scores(model, text: StreamText, streams: int, block: int) -> torch.Tensor:
    """Log-probabilities of all tokens in the order of the text, read in streams."""
    scores = []
    for batch in StreamIterator(_batches(text, streams, block), 1, 0, 0).next_epoch_itr():
        with torch.no_grad():
            logits, extra = model(**batch["net_input"])
        # what did not converge depends on how it was solved
        assert all(bool(solved.result.converged.all()) for solved in extra["equilibria"])
        target = batch["target"]
        score = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        scores.append(score.masked_fill(target == PAD, math.nan))
    whole = torch.cat(scores, 1).flatten()
    return whole[~whole.isnan()]


@pytest.mark.parametrize("subseq_len", [0, 4])
@pytest.mark.parametrize("block", [1, 7, 16])
def test_with_a_memory_of_everything_blocks_do_not_matter(block, subseq_len):
    text = _text(45)
    expected = _scores(build(SEED), text, 1, 45)
    remembering = build(SEED, mem_len=45, subseq_len=subseq_len)
    assert torch.allclose(_scores(remembering, text, 1, block), expected, atol=1e-7)
    forgetful = _scores(build(SEED), text, 1, block)
    assert torch.allclose(forgetful[:block], expected[:block], atol=1e-7)
    assert (forgetful - expected).abs().max() > 1e-3


def test_streams_of_a_batch_do_not_see_each_other():
    text, model = _text(46), build(SEED, mem_len=46)
    # 46 = 16 + 15 + 15
    parts, begin = [], 0
    for length in (16, 15, 15):
        source = text.span(begin - 1, begin + length)
        with torch.no_grad():
            logits, _ = model(source[None, :-1])
        parts.append(logits.log_softmax(-1)[0].gather(-1, source[1:, None])[:, 0])
        begin += length
    assert torch.allclose(_scores(model, text, 3, 4), torch.cat(parts), atol=1e-7)
