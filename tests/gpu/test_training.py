"""fairseq's tools on a device: training in four precisions, resuming, evaluation and generation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import continuations, json_lines, read_perplexity

from fairseq_deq.solvers import captured

PACKAGE = Path(__file__).resolve().parents[2] / "fairseq_deq"
LOG = ("--log-format", "json", "--log-interval", "1", "--disable-validation")
BUDGETS = ("--f-thres", "30", "--b-thres", "30")
TRELLIS = (
    *("--task", "deq_language_modeling", "--arch", "deq_trellisnet_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--mem-len", "1", "--decoder-embed-dim", "16", "--nhid", "12", "--tokens-per-sample", "16"),
)
OPTIMISER = ("--optimizer", "adam", "--lr", "0.01", "--batch-size", "8", "--num-workers", "0")


@pytest.fixture
def train(in_process, deq_training, on_cpu, tmp_path):
    """(option, ...) -> lines of figures of a training on the device."""
    arguments = [word for word in deq_training if word != "--cpu"]

    def run(*options):
        log = in_process(
            "fairseq-train", *arguments, *on_cpu, "--save-dir", tmp_path, *LOG, *BUDGETS, *options
        )
        return [line for line in json_lines(log.text) if "f_conv" in line]

    return run


@pytest.mark.parametrize("precision", ["", "--fp16", "--bf16", "--amp"])
def test_a_training_converges_and_learns(precision, train, on_cpu):
    if precision == "--fp16" and on_cpu:
        pytest.skip("fairseq trains in fp16 on a GPU only")
    lines = train(*filter(None, [precision]), "--max-update", "8")
    assert float(lines[-1]["f_conv"]) > 0.7
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"])


@pytest.mark.parametrize("precision", ["", "--amp"])
def test_recorded_solves_train_as_launched_ones_do(precision, train, recorded):
    """Weights, memory, masks and what is learned of the solves change from update to update."""
    options = (*filter(None, [precision]), "--max-update", "14", "--dropout", "0.1", "--active-set", "never")
    launched = train(*options, "--no-save")
    lines = train(*options, "--no-save", "--cuda-graph", "auto")
    assert not captured.refused
    assert len(captured.kept) >= 2
    tolerance = 0.05 if precision else 2e-3
    for line, expected in zip(lines, launched, strict=True):
        assert float(line["loss"]) == pytest.approx(float(expected["loss"]), rel=tolerance)
        assert float(line["f_conv"]) == pytest.approx(float(expected["f_conv"]), abs=0.05)
    assert float(lines[-1]["f_conv"]) > 0.9


@pytest.mark.parametrize("precision", ["", "--fp16", "--bf16"])
def test_a_trellis_net_trains(precision, in_process, data_bin, on_cpu, tmp_path):
    if precision == "--fp16" and on_cpu:
        pytest.skip("fairseq trains in fp16 on a GPU only")
    log = in_process(
        *("fairseq-train", data_bin, *TRELLIS, *OPTIMISER, *on_cpu, *filter(None, [precision])),
        *("--save-dir", tmp_path, *LOG, *BUDGETS, "--max-update", "4"),
    )
    lines = [line for line in json_lines(log.text) if "f_conv" in line]
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"])


def test_what_a_model_learns_of_its_solves_serves_on_the_device(train, tmp_path):
    lines = train("--max-update", "12")
    assert float(lines[-1]["f_conv"]) > 0.7
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    assert all(torch.isfinite(w).all() for w in state.values() if w.is_floating_point())


def test_resuming_goes_on(train):
    train("--max-update", "3")
    lines = train("--max-update", "6")
    assert int(lines[-1]["num_updates"]) == 6
    assert int(lines[0]["num_updates"]) > 3


def test_evaluation_and_generation(train, in_process, data_bin, on_cpu, tmp_path):
    train("--max-update", "6")
    path = tmp_path / "checkpoint_last.pt"
    options = "--gen-subset test --tokens-per-sample 32 --num-workers 0".split()
    output = in_process("fairseq-eval-lm", data_bin, "--path", path, *options, *on_cpu)
    assert 1 < read_perplexity(output.checked().text)[1] < 5000

    def interactive(tool, *arguments, stdin):
        """In a process of its own, wherever the scripts of fairseq are."""
        words = [str(word) for word in arguments if word != "--cpu"]
        call = "import sys; from fairseq_cli.interactive import cli_main; sys.exit(cli_main())"
        done = subprocess.run(
            [sys.executable, "-c", call, *words, *on_cpu, "--user-dir", str(PACKAGE)],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return SimpleNamespace(checked=lambda: SimpleNamespace(text=done.stdout))

    continuations(interactive, data_bin, path, "the river was\nhe said that\n")
