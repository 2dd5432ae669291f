"""The task through fairseq's tools: training, resuming, validation, evaluation, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from runs import differences, read_perplexity, resumed_state

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


# ---------------------------------------------------------------------- fairseq's tools


def _train(in_process, data_bin: Path, folder: Path, *options: str) -> str:
    return in_process("fairseq-train", data_bin, *TRAINING, "--save-dir", folder, *options).checked().text


def _checkpoint(folder: Path, name: str = "checkpoint_last.pt") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=False)


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
    expected = resumed_state(whole[0])
    assert expected["position"]["epoch"] == 2
    assert expected["position"]["iterations_in_epoch"] > 0
    assert expected["memory"]["memory_state"].shape == (8, 24, 16)
    # the uninterrupted run has validated in between, which must not matter
    assert differences(resumed_state(tmp_path), expected) == []


def test_without_its_memory_a_resumed_run_is_another(whole, in_process, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, *CONTINUED, "3")
    state = _checkpoint(tmp_path)
    assert state["extra_state"].pop("DEQLanguageModelingTask")
    torch.save(state, tmp_path / "checkpoint_last.pt")
    _train(in_process, data_bin, tmp_path, *CONTINUED, "9")
    assert "/weights/decoder.layer.qkv.weight" in " ".join(
        differences(resumed_state(tmp_path), resumed_state(whole[0]))
    )


def test_other_streams_do_not_take_the_memory_of_a_checkpoint(in_process, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, *CONTINUED, "3")
    log = _train(in_process, data_bin, tmp_path, *CONTINUED, "4", "--batch-size", "4")
    assert "memory is of 8 streams after 192 tokens each, and training goes on with 4 after 192" in log
    assert resumed_state(tmp_path)["memory"]["memory_state"].shape[0] == 4


def test_a_memory_of_another_width_is_refused(in_process, refused, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, *CONTINUED, "3")
    path = tmp_path / "checkpoint_last.pt"
    state = torch.load(path, weights_only=False)
    kept = state["extra_state"]["DEQLanguageModelingTask"]
    kept["memory_state"] = kept["memory_state"][..., :8].clone()
    torch.save(state, path)
    options = (*TRAINING, "--save-dir", tmp_path, *CONTINUED, "4")
    sentence = refused("fairseq-train", data_bin, *options).text
    assert "the checkpoint's memory has 8 channels, the model 16" in sentence


def test_what_training_leaves_out_is_said(whole):
    said = re.search(r"train: ([\d,]+) tokens in 8 streams, (\d+) batches; the last (\d+) tokens", whole[1])
    assert said, whole[1]
    total, batches, left_out = (int(number.replace(",", "")) for number in said.groups())
    assert total - left_out == batches * 8 * 32
    assert left_out < 8 * 32


def _by_hand(paths: list[Path], data_bin: Path, split: str, rows: int, block: int, **overrides: Any):
    """Number of tokens and perplexity of a text in `rows` streams, each solved alone by every model."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path) for path in paths], arg_overrides={"data": str(data_bin), **overrides}
    )
    sentences = data_utils.load_indexed_dataset(str(data_bin / split), task.dictionary)
    tokens = torch.cat(
        [torch.tensor([task.dictionary.eos()]), *(sentences[i] for i in range(len(sentences)))]
    ).long()
    total, loss = len(tokens) - 1, 0.0
    for places in torch.tensor_split(torch.arange(total), rows):
        memories = [None] * len(models)
        for at in places.split(block):
            probabilities = torch.zeros(())
            for i, model in enumerate(models):
                with torch.no_grad():
                    logits, extra = model.eval()(tokens[at][None], memory=memories[i])
                memories[i] = extra["memory"]
                probabilities = probabilities + logits.double().softmax(-1)[0] / len(models)
            loss -= probabilities.log().gather(-1, tokens[at + 1][:, None]).sum().item()
    return total, math.exp(loss / total)


@pytest.mark.parametrize("rows", [None, 8])
def test_evaluation_is_what_the_model_says_of_each_stream_alone(rows, whole, in_process, data_bin):
    path = whole[0] / "checkpoint_last.pt"
    options = () if rows is None else ("--batch-size", str(rows))
    output = in_process(
        "fairseq-eval-lm", data_bin, *EVALUATION, "--path", path, "--gen-subset", "test", *options
    )
    tokens, perplexity = read_perplexity(output.text)
    expected_tokens, expected = _by_hand([path], data_bin, "test", rows or 1, 32)
    assert tokens == expected_tokens
    assert perplexity == pytest.approx(expected, abs=0.01)
    # each row starts without a memory, and that is the only difference
    assert rows is None or perplexity != pytest.approx(_by_hand([path], data_bin, "test", 1, 32)[1], abs=0.01)


def test_models_of_an_ensemble_have_memories_of_their_own(whole, in_process, data_bin, tmp_path):
    _train(in_process, data_bin, tmp_path, "--seed", "7", "--lr", "0.02", "--max-update", "3")
    paths = [whole[0] / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt"]
    _, expected = _by_hand(paths, data_bin, "test", 1, 32)
    names = ":".join(map(str, paths))
    output = in_process("fairseq-eval-lm", data_bin, *EVALUATION, "--path", names, "--gen-subset", "test")
    assert read_perplexity(output.text)[1] == pytest.approx(expected, abs=0.01)
    assert abs(expected - _by_hand(paths[:1], data_bin, "test", 1, 32)[1]) > 1
    assert abs(expected - _by_hand(paths[1:], data_bin, "test", 1, 32)[1]) > 1


def test_lengths_can_be_changed_at_evaluation(whole, in_process, data_bin):
    path = whole[0] / "checkpoint_last.pt"
    overrides = {"mem_len": 40, "subseq_len": 5, "f_thres": 20}
    output = in_process(
        "fairseq-eval-lm", data_bin, *EVALUATION, "--path", path, "--gen-subset", "test",
        *("--batch-size", "3", "--tokens-per-sample", "20", "--model-overrides", str(overrides)),
    )  # fmt: skip
    expected_tokens, expected = _by_hand([path], data_bin, "test", 3, 20, **overrides)
    assert read_perplexity(output.text) == (expected_tokens, pytest.approx(expected, abs=0.01))


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
    tokens, perplexity = read_perplexity(evaluated.text)
    assert math.log2(perplexity) == pytest.approx(valid, abs=1e-3)
    assert f"valid: {tokens} tokens in 8 streams" in checked


def test_the_same_model_is_evaluated_without_streams(whole, in_process, data_bin):
    path = whole[0] / "checkpoint_last.pt"
    stateless = ("--task", "language_modeling", *EVALUATION[2:], "--path", path, "--gen-subset", "test")
    tokens, perplexity = read_perplexity(in_process("fairseq-eval-lm", data_bin, *stateless).text)
    assert (tokens, pytest.approx(perplexity, abs=0.01)) == _by_hand(
        [path], data_bin, "test", 1, 32, mem_len=0
    )


def test_interactive_continues_prompts(whole, in_process, data_bin):
    output = in_process(
        "fairseq-interactive", data_bin, *TASK, "--path", whole[0] / "checkpoint_last.pt", "--cpu",
        *"--beam 2 --max-len-a 1 --max-len-b 4 --buffer-size 2 --batch-size 2".split(),
        stdin="the people of\nI am\n",
    )  # fmt: skip
    assert len(re.findall(r"^H-\d\t-[\d.]+\t\S+", output.text, re.MULTILINE)) == 2


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
