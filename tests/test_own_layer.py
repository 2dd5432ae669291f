"""A layer of one's own goes through fairseq's tools and ours, from another --user-dir."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runs import json_lines, read_perplexity

from fairseq_deq.tools.entry import run

ROOT = Path(__file__).parent.parent
OWN = ROOT / "examples" / "own-layer" / "own_layers"
SMALL = (
    *("--user-dir", OWN, "--task", "deq_language_modeling", "--criterion", "deq_lm_loss"),
    *(
        "--decoder-embed-dim",
        "16",
        "--share-decoder-input-output-embed",
        "--init-std",
        "0.1",
        "--mem-len",
        "8",
    ),
    *("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "0.5", "--tokens-per-sample", "16"),
    *("--batch-size", "8", "--num-workers", "0", "--cpu", "--seed", "3", "--log-format", "json"),
    *("--log-interval", "5", "--no-epoch-checkpoints"),
)


LAYERS = ["deq_gated_convolution_lm", pytest.param("deq_mixer_lm", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=LAYERS)
def trained(request, in_process, data_bin, tmp_path_factory):
    """A model trained with subsequences, penalty and spectral radius, and the log of the run."""
    folder = tmp_path_factory.mktemp(request.param)
    own = ("--taps", "2") if "gated" in request.param else ("--reach", "4", "--hidden", "24")
    extra = (
        "--subseq-len",
        "8",
        "--jac-loss-weight",
        "0.1",
        "--spectral-radius",
        "4",
        "--pretrain-steps",
        "5",
    )
    arguments = (data_bin, *SMALL, "--arch", request.param, *own, *extra, "--max-update", "40")
    log = in_process("fairseq-train", *arguments, "--save-dir", folder, plugin=False).checked().text
    return folder / "checkpoint_last.pt", log


def test_it_trains_with_everything_on(trained):
    lines = [line for line in json_lines(trained[1]) if "loss" in line]
    assert float(lines[-1]["loss"]) < float(lines[0]["loss"]) - 0.5
    assert float(lines[-1]["f_conv"]) > 0.9
    assert float(lines[-1]["b_conv"]) > 0.9
    assert float(lines[-1]["jac"]) > 0
    valid = [line for line in json_lines(trained[1]) if "valid_sradius" in line]
    assert 0 < float(valid[-1]["valid_sradius"]) < 10


def test_it_is_evaluated_and_generates(trained, in_process, data_bin):
    path = ("--user-dir", OWN, "--path", trained[0])
    small = ("--tokens-per-sample", "16", "--batch-size", "4", "--num-workers", "0", "--cpu")
    log = in_process("fairseq-eval-lm", data_bin, *path, *small, "--gen-subset", "valid", plugin=False)
    tokens, perplexity = read_perplexity(log.checked().text)
    assert tokens > 100
    assert 1 < perplexity < 2000


SLOW_TOOLS = [pytest.param(tool, marks=pytest.mark.slow) for tool in ("benchmark", "benchmark-generation")]


@pytest.mark.parametrize("tool", ["score", "anytime", "diagnose", *SLOW_TOOLS])
def test_every_tool_works_with_it(tool, trained, data_bin, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the people of the states\n", encoding="utf-8")
    own, path, data = ["--user-dir", str(OWN)], str(trained[0]), str(data_bin)
    small = ["--tokens-per-sample", "16", "--num-workers", "0", "--cpu"]
    arguments = {
        "score": [data, "--path", path, "--input", str(text), "--cpu"],
        "anytime": [data, "--path", path, "--gen-subset", "valid", *small],
        "diagnose": [path, data, "--gen-subset", "valid", "--tokens", "200", "--rows", "2", "--out"],
        "benchmark": [
            data,
            "--path",
            path,
            "--tokens",
            "8",
            "--batch",
            "2",
            "--memory",
            "8",
            "--rounds",
            "1",
        ],
        "benchmark-generation": [data, "--path", path, "--contexts", "8", "--batches", "1", "--turns", "1"],
    }[tool]
    arguments += [str(tmp_path / "report.html")] if tool == "diagnose" else []
    arguments += ["--out", str(tmp_path / "out")] if tool.startswith("benchmark") else []
    status = run(tool, [*arguments, *own])
    printed = capsys.readouterr().out
    assert status in ((0, 1) if tool == "diagnose" else (0,)), printed
    if tool == "diagnose":
        assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") > 2
    else:
        assert re.search(r"\d\.\d", printed)


def test_a_prompt_is_continued(trained, in_process, data_bin):
    log = in_process(
        *(
            "fairseq-interactive",
            data_bin,
            "--user-dir",
            OWN,
            "--task",
            "language_modeling",
            "--path",
            trained[0],
        ),
        *("--beam", "2", "--max-len-b", "8", "--cpu"),
        stdin="the people\n",
        plugin=False,
    )
    assert re.search(r"^H-0\t\S+\tthe people \S+", log.checked().text, re.MULTILINE)
