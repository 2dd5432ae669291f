"""TrellisNets through fairseq's own tools on real text: train, resume, validate, evaluate, generate."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import pytest
from runs import check_adaptive, check_resuming, continuations, json_lines, read_perplexity
from test_end_to_end import STATISTICS

TINY = (
    *("--task", "language_modeling", "--arch", "deq_trellisnet_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "32", "--nhid", "16", "--init-std", "0.1"),
    *("--optimizer", "adam", "--lr", "0.005", "--clip-norm", "0.5", "--tokens-per-sample", "32"),
    *("--batch-size", "8", "--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu"),
    *("--log-format", "json", "--log-interval", "2", "--seed", "3"),
)
DROPOUTS = (
    *("--dropout", "0.1", "--dropouti", "0.1", "--dropouth", "0.1", "--emb-dropout", "0.1"),
    *("--wdrop", "0.1"),
)


def _train(in_process, data_bin: Path, folder: Path, *more: str, options: tuple[str, ...] = ()) -> str:
    arguments = (data_bin, *TINY, "--save-dir", folder, *options, *more)
    return in_process("fairseq-train", *arguments).checked().text


@pytest.fixture(scope="module")
def trained(in_process, data_bin, tmp_path_factory):
    """A model trained for 30 updates, 10 of them as a stack, and the log of the run."""
    folder = tmp_path_factory.mktemp("trellis")
    options = "--max-update 30 --pretrain-steps 10 --pretrain-layers 4".split()
    return folder, _train(in_process, data_bin, folder, *options)


def test_training_learns_and_logs_both_solves(trained):
    _, log = trained
    lines = [line for line in json_lines(log) if "loss" in line]
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"]) - 0.7
    equilibrium = [line for line in lines if "f_nfe" in line]
    assert 0 < len(equilibrium) < len(lines)  # a stack has no solve
    for name in STATISTICS:
        assert all(math.isfinite(float(line[name])) for line in equilibrium), name
    assert 0.9 < float(equilibrium[-1]["f_conv"]) <= 1
    assert 0.9 < float(equilibrium[-1]["b_conv"]) <= 1
    assert 1 < float(equilibrium[-1]["f_lane_nfe"]) <= float(equilibrium[-1]["f_nfe"]) <= 30


def test_validation_in_training_and_eval_lm_agree(trained, in_process, data_bin):
    folder, log = trained
    valid = next(float(line["valid_loss"]) for line in reversed(json_lines(log)) if "valid_loss" in line)
    _, perplexity = read_perplexity(
        in_process(
            "fairseq-eval-lm",
            data_bin,
            "--path",
            folder / "checkpoint_last.pt",
            *"--gen-subset valid --tokens-per-sample 32 --batch-size 4 --num-workers 0 --cpu".split(),
        )
        .checked()
        .text
    )
    assert math.log2(perplexity) == pytest.approx(valid, abs=2e-3)


def test_interactive_continues_prompts(trained, in_process, data_bin):
    output = continuations(in_process, data_bin, trained[0] / "checkpoint_last.pt", "the people of\nof\n")
    assert re.search(r"^D-0\t-[\d.]+\tthe people of", output, re.MULTILINE)


def test_another_scope_of_its_solves_says_what_to_add(trained, refused, in_process, data_bin):
    options = (data_bin, "--path", trained[0] / "checkpoint_last.pt", "--gen-subset", "valid", "--cpu")
    small = ("--tokens-per-sample", "32", "--num-workers", "0")
    other = "'solver_scope': 'position'"
    refusal = refused("fairseq-eval-lm", *options, *small, "--model-overrides", f"{{{other}}}").text
    assert "of another size with this --solver-scope" in refusal
    added = "'preconditioner_rank': 0, 'learned_start': False"
    assert added in refusal
    overrides = f"{{{other}, {added}}}"
    output = in_process("fairseq-eval-lm", *options, *small, "--model-overrides", overrides).checked()
    assert "Perplexity: " in output.text


def test_a_dilation_is_refused_in_one_sentence(refused, data_bin):
    sentence = refused("fairseq-train", data_bin, *TINY, "--dilation", "2").text
    assert "--dilation must be 1, got 2" in sentence


@pytest.mark.parametrize("stop", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_resuming_on_either_side_of_the_switch_gives_the_uninterrupted_run(
    stop, in_process, data_bin, tmp_path
):
    options = ("--pretrain-steps", "5", "--disable-validation", *DROPOUTS)
    check_resuming(partial(_train, in_process, data_bin, options=options), tmp_path, stop, 10)


def test_streams_with_a_carried_state_resume_bit_for_bit(in_process, data_bin, tmp_path):
    streams = ("--task", "deq_language_modeling", "--tokens-per-sample", "16", "--batch-size", "4")
    options = (*streams, *DROPOUTS, "--disable-validation")
    check_resuming(partial(_train, in_process, data_bin, options=options), tmp_path, 3, 6)


def test_adaptive_input_and_softmax_train_and_evaluate(in_process, data_bin, tmp_path):
    options = ("--adaptive-input-factor", "1", "--adaptive-softmax-factor", "1")
    train = partial(_train, in_process, data_bin, options=options)
    check_adaptive(in_process, data_bin, tmp_path, train)
