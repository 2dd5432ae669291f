"""The variants of the Transformer's layer the whole way, all at once: train, evaluate, generate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import json_lines, read_losses, read_perplexity, read_weights

MODEL = (
    *("--task", "deq_language_modeling", "--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "24", "--decoder-attention-heads", "2"),
    *("--activation-fn", "silu", "--decoder-gated-ffn", "--decoder-norm", "rms", "--decoder-norm-affine"),
    *(
        "--decoder-input-residual",
        "--f-thres",
        "12",
        "--b-thres",
        "12",
        "--mem-len",
        "12",
        "--dropout",
        "0.1",
    ),
)
TRAINING = (
    *("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "0.5", "--tokens-per-sample", "24"),
    *("--batch-size", "8", "--num-workers", "0", "--cpu", "--seed", "3", "--max-update", "14"),
    *("--log-format", "json", "--log-interval", "1"),
)


@pytest.fixture(scope="module")
def trained(in_process, data_bin, tmp_path_factory):
    """The checkpoint, and the log of the run."""
    folder = tmp_path_factory.mktemp("variants")
    arguments = (data_bin, *MODEL, *TRAINING, "--save-dir", folder)
    return folder / "checkpoint_last.pt", in_process("fairseq-train", *arguments).checked().text


def test_training_learns_and_moves_every_new_parameter(trained):
    path, log = trained
    losses, weights = read_losses(log), read_weights(path)
    assert losses[-1] < losses[0] - 0.5
    layer = "decoder.layer."
    for name in ("middle_norm.gain", "closing_norm.gain"):
        assert ((weights[layer + name] - 1).abs() > 1e-3).all()
    assert (weights[layer + "ffn_gate.bias"].abs() > 1e-3).any()
    assert not [name for name in weights if name.endswith("norm.bias")]  # RMS norm has a gain alone
    assert weights["decoder.injection.weight"].shape == (3 * 16 + 16, 16)


def test_evaluation_agrees_with_validation(trained, in_process, data_bin: Path):
    path, log = trained
    valid = next(float(line["valid_loss"]) for line in reversed(json_lines(log)) if "valid_loss" in line)
    text = in_process(
        *("fairseq-eval-lm", data_bin, "--path", path, "--task", "deq_language_modeling"),
        *("--tokens-per-sample", "24", "--batch-size", "8", "--num-workers", "0", "--cpu"),
        *("--gen-subset", "valid"),
    )
    assert math.log2(read_perplexity(text.checked().text)[1]) == pytest.approx(valid, abs=5e-3)


def test_interactive_continues_prompts(trained, in_process, data_bin):
    text = in_process(
        *("fairseq-interactive", data_bin, "--path", trained[0], "--task", "deq_language_modeling", "--cpu"),
        *("--beam", "2", "--max-len-a", "1", "--max-len-b", "8"),
        stdin="the people of\nthe United\n",
    )
    found = [line.split("\t")[2] for line in text.checked().text.splitlines() if line.startswith("H-")]
    assert [line.split()[:2] for line in found] == [["the", "people"], ["the", "United"]]
    assert len(found[0].split()) > 3
    assert len(found[1].split()) > 2
