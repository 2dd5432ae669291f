"""`--help` shows the options of what is chosen, and the log its columns in an order that can be read."""

import contextlib
import io
import sys

import pytest
from conftest import PACKAGE
from fairseq_cli import train
from runs import json_lines


def test_help_shows_the_options_of_the_model_the_task_and_the_criterion(monkeypatch):
    words = [
        "fairseq-train",
        "--task",
        "copy_memory",
        "--arch",
        "deq_transformer_lm",
        "--user-dir",
        str(PACKAGE),
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ending:
        train.cli_main()
    assert ending.value.code == 0
    for option in ("--f-thres", "--solver-scope", "--jac-loss-weight", "--blank-len", "--save-dir"):
        assert option in shown.getvalue()


def test_columns_of_the_solves_stand_after_loss_and_perplexity(in_process, deq_training, tmp_path):
    options = (*deq_training, "--save-dir", tmp_path, "--log-format", "json", "--log-interval", "1")
    line = [*json_lines(in_process("fairseq-train", *options, "--disable-validation").text)[0]]
    expected = ["loss", "nll_loss", "ppl", "f_nfe", "f_lane_nfe", "f_res", "f_conv"]
    assert [name for name in line if name in expected] == expected
    assert line.index("f_conv") < line.index("wps")
