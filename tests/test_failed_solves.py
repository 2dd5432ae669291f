"""A failed solve never looks like a success: every tool notices it, and says how well the others went."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from conftest import run_in_process
from selection import few_of

from fairseq_deq.errors import OptionError
from fairseq_deq.models.deq_transformer_lm import DEQTransformerLanguageModel
from fairseq_deq.tools import anytime, score

EVALUATION = ("--task", "language_modeling", "--tokens-per-sample", "32", "--num-workers", "0", "--cpu")
SEARCH = ("--beam", "2", "--max-len-a", "1", "--max-len-b", "3", "--batch-size", "4")
PROMPTS = "the people of the United States\nwe\n"


def _eval_lm(data, path, folder):
    return run_in_process("fairseq-eval-lm", data, "--path", path, *EVALUATION)


def _streams(data, path, folder):
    task = ("--task", "deq_language_modeling")
    return run_in_process("fairseq-eval-lm", data, "--path", path, *EVALUATION, *task)


def _validate(data, path, folder):
    options = ("--batch-size", "8", "--required-batch-size-multiple", "1")
    return run_in_process("fairseq-validate", data, "--path", path, *EVALUATION, *options)


def _interactive(data, path, folder):
    (folder / "prompts.txt").write_text(PROMPTS)
    options = ("--input", folder / "prompts.txt", *SEARCH, "--buffer-size", "4")
    return run_in_process("fairseq-interactive", data, "--path", path, *EVALUATION, *options)


def _generate(data, path, folder):
    options = ("--sample-break-mode", "eos", "--gen-subset", "valid", *SEARCH)
    options = (*options, "--skip-invalid-size-inputs-valid-test", "--required-batch-size-multiple", "1")  # type: ignore[assignment]
    return run_in_process("fairseq-generate", data, "--path", path, *EVALUATION, *options)


def _train(data, path, folder):
    from conftest import TINY_DEQ, TRAINING

    options = (
        "--restore-file",
        path,
        "--save-dir",
        folder / "save",
        "--max-update",
        "4",
        "--disable-validation",
    )
    return run_in_process("fairseq-train", data, *TINY_DEQ, *TRAINING, *options)


def _score(data, path, folder):
    (folder / "text.txt").write_text(PROMPTS)
    score.run([str(data), "--path", str(path), "--input", str(folder / "text.txt"), "--cpu"])


def _json(data, path, folder):
    (folder / "text.txt").write_text(PROMPTS)
    text = ("--input", str(folder / "text.txt"), "--cpu", "--json")
    score.run([str(data), "--path", str(path), *text])


def _hub(data, path, folder):
    DEQTransformerLanguageModel.from_pretrained(path, data_name_or_path=data).perplexity(PROMPTS.splitlines())


def _anytime(data, path, folder):
    anytime.run([str(data), "--path", str(path), "--gen-subset", "valid", *EVALUATION])


TOOLS = {
    function.__name__[1:]: function
    for function in (
        _eval_lm,
        _streams,
        _validate,
        _interactive,
        _generate,
        _train,
        _score,
        _json,
        _hub,
        _anytime,
    )
}


def _spoil(state, name, number):
    weight = state["model"][name]
    weight.view(-1)[weight.numel() // 2] = number


def _row(state):
    state["model"]["decoder.embed_tokens.weight"][4] = float("nan")


SPOILT = {
    "NaN in the layer": lambda state: _spoil(state, "decoder.layer.qkv.weight_v", float("nan")),
    "infinity in the layer": lambda state: _spoil(state, "decoder.layer.ffn_in.weight_v", float("inf")),
    "row of the embedding": _row,
}


@pytest.mark.parametrize(("tool", "how"), few_of((tool, how) for tool in TOOLS for how in SPOILT))
def test_a_checkpoint_that_is_not_finite_is_refused(
    monkeypatch, deq_checkpoint, data_bin, tmp_path, tool, how
):
    state = torch.load(deq_checkpoint, weights_only=False)
    SPOILT[how](state)
    torch.save(state, tmp_path / "spoilt.pt")
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises((SystemExit, OptionError), match="NaN or infinity in its weights") as refused:
        TOOLS[tool](data_bin, tmp_path / "spoilt.pt", tmp_path)
    assert "\n" not in str(refused.value)
    assert not os.path.exists(tmp_path / "save" / "checkpoint_last.pt")


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "train"])
def test_a_layer_that_overflows_is_refused(monkeypatch, deq_checkpoint, data_bin, tmp_path, tool):
    state = torch.load(deq_checkpoint, weights_only=False)
    for name, weight in state["model"].items():
        if "ffn" in name:
            weight.fill_(3e38)
    torch.save(state, tmp_path / "huge.pt")
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises((SystemExit, OptionError), match="the layer is not finite at") as refused:
        TOOLS[tool](data_bin, tmp_path / "huge.pt", tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tool", ["eval_lm", "streams", "validate", "interactive", "generate"])
def test_the_solves_stand_beside_the_numbers(deq_checkpoint, data_bin, tmp_path, tool):
    output = TOOLS[tool](data_bin, deq_checkpoint, tmp_path)
    (said,) = re.findall(
        r"Solves: ([\d.]+)% of ([\d,]+) positions converged, mean residual ([\d.e-]+)", output.text
    )
    share, positions, residual = float(said[0]), int(said[1].replace(",", "")), float(said[2])
    assert share < 99  # 8 evaluations are few
    assert positions > 6
    assert residual > 1e-3
    assert "the numbers are not those of the equilibrium" in output.text


def test_a_stock_model_has_no_solves(tiny_checkpoint, data_bin, tmp_path):
    assert "Solves" not in _eval_lm(data_bin, tiny_checkpoint, tmp_path).text
