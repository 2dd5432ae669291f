"""Streams cover the text once and in order, and the memory goes along, in every kind of pass."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from models.builders import build

from fairseq_deq.errors import OptionError
from fairseq_deq.modules.memory import Memory, MemoryCarrier
from fairseq_deq.tasks._streams import StreamBatches, StreamIterator, StreamText

EOS, PAD = 2, 1
TASK = ("--task", "deq_language_modeling")
MODEL = (
    *("--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss", "--decoder-embed-dim", "16"),
    *("--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2", "--mem-len", "24"),
)
TRAINING = (
    *(*TASK, *MODEL, "--f-thres", "8", "--b-thres", "8", "--tokens-per-sample", "32", "--batch-size", "8"),
    *("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "0.5", "--num-workers", "0", "--cpu"),
    *("--log-format", "json", "--log-interval", "1", "--seed", "3"),
)
EVALUATION = (*TASK, "--tokens-per-sample", "32", "--num-workers", "0", "--cpu")
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


# ---------------------------------------------------------------------- fairseq's tools


def _train(in_process, data_bin: Path, folder: Path, *options: str) -> str:
    return in_process("fairseq-train", data_bin, *TRAINING, "--save-dir", folder, *options).checked().text


def _checkpoint(folder: Path, name: str = "checkpoint_last.pt") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=False)


def _kept(folder: Path, name: str = "checkpoint_last.pt") -> dict[str, Any]:
    """What a resumed run must have in common with the uninterrupted one."""
    state = _checkpoint(folder, name)
    weights = {name: w for name, w in state["model"].items() if "_float_tensor" not in name}
    extra = state["extra_state"]
    return {
        "weights": weights,
        "optimizer": state["last_optimizer_state"]["state"],
        "updates": state["optimizer_history"][-1]["num_updates"],
        "position": extra["train_iterator"],
        "memory": extra["DEQLanguageModelingTask"],
    }


def _differences(a: Any, b: Any, at: str = "") -> list[str]:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        return [d for key in a for d in _differences(a[key], b[key], f"{at}/{key}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [at]


def _perplexity(text: str) -> tuple[int, float]:
    tokens = re.search(r"Evaluated ([\d,]+) tokens", text)
    perplexity = re.search(r"Perplexity: ([\d.]+)", text)
    assert tokens, text
    assert perplexity, text
    return int(tokens.group(1).replace(",", "")), float(perplexity.group(1))


@pytest.fixture(scope="module")
def whole(in_process, data_bin, tmp_path_factory):
    """A run of 9 updates of 2 batches, with dropout, in two passes over the text; and its log."""
    folder = tmp_path_factory.mktemp("whole")
    options = "--max-update 9 --update-freq 2 --dropout 0.1 --attention-dropout 0.1".split()
    return folder, _train(in_process, data_bin, folder, *options)


CONTINUED = "--update-freq 2 --dropout 0.1 --attention-dropout 0.1 --disable-validation --max-update".split()


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(stop, whole, in_process, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, *CONTINUED, str(stop))
    _train(in_process, data_bin, tmp_path, *CONTINUED, "9")
    expected = _kept(whole[0])
    assert expected["position"]["epoch"] == 2
    assert expected["position"]["iterations_in_epoch"] > 0
    assert expected["memory"]["memory_state"].shape == (8, 24, 16)
    # the uninterrupted run has validated in between, which must not matter
    assert _differences(_kept(tmp_path), expected) == []


def test_without_its_memory_a_resumed_run_is_another(whole, in_process, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, *CONTINUED, "3")
    state = _checkpoint(tmp_path)
    assert state["extra_state"].pop("DEQLanguageModelingTask")
    torch.save(state, tmp_path / "checkpoint_last.pt")
    _train(in_process, data_bin, tmp_path, *CONTINUED, "9")
    assert "/weights/decoder.cell.qkv.weight" in " ".join(_differences(_kept(tmp_path), _kept(whole[0])))


def test_other_streams_do_not_take_the_memory_of_a_checkpoint(in_process, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, *CONTINUED, "3")
    log = _train(in_process, data_bin, tmp_path, *CONTINUED, "4", "--batch-size", "4")
    assert "memory is of 8 streams after 192 tokens each, and training goes on with 4 after 192" in log
    assert _kept(tmp_path)["memory"]["memory_state"].shape[0] == 4


def test_what_training_leaves_out_is_said(whole):
    said = re.search(r"train: ([\d,]+) tokens in 8 streams, (\d+) batches; the last (\d+) tokens", whole[1])
    assert said, whole[1]
    total, batches, left_out = (int(number.replace(",", "")) for number in said.groups())
    assert total - left_out == batches * 8 * 32
    assert left_out < 8 * 32


def _by_hand(path: Path, data_bin: Path, split: str, rows: int, block: int, **overrides: Any):
    """Number of tokens and perplexity of a text in `rows` streams, each solved alone."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(data_bin), **overrides}
    )
    model.eval()
    sentences = data_utils.load_indexed_dataset(str(data_bin / split), task.dictionary)
    tokens = torch.cat([torch.tensor([EOS]), *(sentences[i] for i in range(len(sentences)))]).long()
    total, loss = len(tokens) - 1, 0.0
    for places in torch.tensor_split(torch.arange(total), rows):
        memory = None
        for at in places.split(block):
            with torch.no_grad():
                logits, extra = model(tokens[at][None], memory=memory)
            memory = extra["memory"]
            loss -= logits.double().log_softmax(-1)[0].gather(-1, tokens[at + 1][:, None]).sum().item()
    return total, math.exp(loss / total)


@pytest.mark.parametrize("rows", [None, 8])
def test_evaluation_is_what_the_model_says_of_each_stream_alone(rows, whole, in_process, data_bin):
    path = whole[0] / "checkpoint_last.pt"
    options = () if rows is None else ("--batch-size", str(rows))
    output = in_process(
        "fairseq-eval-lm", data_bin, *EVALUATION, "--path", path, "--gen-subset", "test", *options
    )
    tokens, perplexity = _perplexity(output.text)
    expected_tokens, expected = _by_hand(path, data_bin, "test", rows or 1, 32)
    assert tokens == expected_tokens
    assert perplexity == pytest.approx(expected, abs=0.01)
    # each row starts without a memory, and that is the only difference
    assert rows is None or perplexity != pytest.approx(_by_hand(path, data_bin, "test", 1, 32)[1], abs=0.01)


def test_lengths_can_be_changed_at_evaluation(whole, in_process, data_bin):
    path = whole[0] / "checkpoint_last.pt"
    overrides = {"mem_len": 40, "subseq_len": 5, "f_thres": 20}
    output = in_process(
        "fairseq-eval-lm", data_bin, *EVALUATION, "--path", path, "--gen-subset", "test",
        *("--batch-size", "3", "--tokens-per-sample", "20", "--model-overrides", str(overrides)),
    )  # fmt: skip
    expected_tokens, expected = _by_hand(path, data_bin, "test", 3, 20, **overrides)
    assert _perplexity(output.text) == (expected_tokens, pytest.approx(expected, abs=0.01))


def test_fewer_streams_than_asked_for_are_said(whole, in_process, data_bin):
    path = ("--path", whole[0] / "checkpoint_last.pt", "--gen-subset", "test")
    output = in_process(
        "fairseq-eval-lm", data_bin, *EVALUATION, *path, "--batch-size", "8", "--max-tokens", "64"
    )
    assert "2 streams instead of --batch-size 8: --max-tokens 64 has no room" in output.text
    assert "tokens in 2 streams" in output.text


def test_validation_in_training_fairseq_validate_and_eval_lm_agree(whole, in_process, data_bin):
    folder, log = whole
    lines = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '{"epoch"' in line]
    valid = next(float(line["valid_loss"]) for line in reversed(lines) if "valid_loss" in line)
    path = ("--path", folder / "checkpoint_last.pt")
    tools = ("--batch-size", "8", "--num-workers", "0", "--cpu")
    checked = in_process("fairseq-validate", data_bin, *TASK, *path, *tools, "--valid-subset", "valid").text
    (again,) = re.findall(r"\| loss ([\d.]+) \|", checked)[-1:]
    assert float(again) == valid
    evaluated = in_process(
        "fairseq-eval-lm", data_bin, *EVALUATION, *path, "--gen-subset", "valid", "--batch-size", "8"
    )
    tokens, perplexity = _perplexity(evaluated.text)
    assert math.log2(perplexity) == pytest.approx(valid, abs=1e-3)
    assert f"valid: {tokens} tokens in 8 streams" in checked


def test_the_same_model_is_evaluated_without_streams(whole, in_process, data_bin):
    path = whole[0] / "checkpoint_last.pt"
    stateless = ("--task", "language_modeling", *EVALUATION[2:], "--path", path, "--gen-subset", "test")
    tokens, perplexity = _perplexity(in_process("fairseq-eval-lm", data_bin, *stateless).text)
    assert (tokens, pytest.approx(perplexity, abs=0.01)) == _by_hand(path, data_bin, "test", 1, 32, mem_len=0)


def test_interactive_continues_prompts(whole, in_process, data_bin, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the people of\nI am\n"))
    output = in_process(
        "fairseq-interactive", data_bin, *TASK, "--path", whole[0] / "checkpoint_last.pt", "--cpu",
        *"--beam 2 --max-len-a 1 --max-len-b 4 --buffer-size 2 --batch-size 2".split(),
    )  # fmt: skip
    assert len(re.findall(r"^H-\d\t-[\d.]+\t\S+", output.text, re.MULTILINE)) == 2


# ---------------------------------------------------------------------- several processes


def test_two_processes_train_as_one_with_their_rows_and_resume(in_process, data_bin, tmp_path):
    # Picard, since Anderson's mixing makes much of a rounding error where nothing has converged yet.
    options = (
        *"--disable-validation --optimizer sgd --lr 0.5 --f-solver picard --b-solver picard".split(),
        *"--save-interval-updates 2 --max-update".split(),
    )
    halves = ("--distributed-world-size", "2", "--batch-size", "4")
    _train(in_process, data_bin, tmp_path / "one", *options, "2")
    _train(in_process, data_bin, tmp_path / "two", *options, "4", *halves)
    one, two = _kept(tmp_path / "one"), _kept(tmp_path / "two", "checkpoint_1_2.pt")
    for kind in ("weights", "memory"):
        for name, tensor in one[kind].items():
            assert torch.allclose(two[kind][name], tensor, atol=1e-5), name
    assert one["position"] == two["position"]
    first = ("--restore-file", tmp_path / "two" / "checkpoint_1_2.pt")
    _train(in_process, data_bin, tmp_path / "parts", *options, "4", *halves, *first)
    assert _differences(_kept(tmp_path / "parts"), _kept(tmp_path / "two")) == []


# ---------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--sample-break-mode", "eos"), "--sample-break-mode eos does not work with --task"),
        (("--add-bos-token",), "--add-bos-token does not work with --task"),
        (("--tokens-per-sample", "0"), "--tokens-per-sample must be at least 1"),
        (("--batch-size", "5000"), "give a smaller --batch-size"),
        (("--max-tokens", "16"), "--max-tokens 16 is less than --tokens-per-sample 32"),
    ],
)
def test_options_that_cannot_work_are_refused(options, sentence, refused, data_bin, tmp_path):
    arguments = (*TRAINING, "--disable-validation", "--save-dir", tmp_path, *options)
    assert sentence in refused("fairseq-train", data_bin, *arguments).text


def test_a_model_without_memory_is_refused(refused, tiny_training, tmp_path):
    output = refused("fairseq-train", *tiny_training, *TASK, "--save-dir", tmp_path)
    assert "needs a model that takes a memory" in output.text


def test_a_context_window_is_refused(whole, refused, data_bin):
    path = ("--path", whole[0] / "checkpoint_last.pt", "--gen-subset", "test", "--context-window", "8")
    assert "mem_len" in refused("fairseq-eval-lm", data_bin, *EVALUATION, *path).text
