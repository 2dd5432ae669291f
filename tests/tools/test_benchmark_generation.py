"""The benchmark of generation measures what it says."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TRAINING

from fairseq_deq.tools.benchmark_generation import command
from fairseq_deq.tools.benchmark_generation.decoding import Search


def test_one_run_prints_writes_and_counts(capsys, tmp_path, data_bin, deq_checkpoint):
    out = tmp_path / "generation"
    options = "--contexts 6 --batches 2 --beams 1 3 --tokens 3 --turns 2 --layers 5 --threads 1 --cpu".split()
    arguments = [str(data_bin), "--path", str(deq_checkpoint), *options, "--out", str(out)]
    assert command.main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    results = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    assert len(results) == 2
    assert len(table) == 4
    for entry, beam in zip(results, (1, 3)):
        assert (entry["context"], entry["batch"], entry["beam"]) == (6, 2, beam)
        ours, stack = entry["ours"], entry["stack"]
        assert len(ours["seconds"]) == len(stack["seconds"]) == len(entry["uncached"]["seconds"]) == 2
        # One layer of keys and values of width 16 in single precision, and as many times that as layers.
        assert ours["cache_bytes"] == 2 * 16 * 4
        assert stack["cache_bytes"] == 5 * 2 * 16 * 4
        assert 1 <= ours["needed_evaluations"] <= ours["own_evaluations"] <= ours["evaluations"] <= 8
        ratios = sorted(b / a for a, b in zip(ours["seconds"], stack["seconds"]))
        assert entry["speed_over_stack"] == pytest.approx(sum(ratios) / 2)
    pytest.importorskip("matplotlib")
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_trellisnet_keeps_one_state_of_its_text(tmp_path, data_bin, in_process):
    sizes = (
        "--decoder-embed-dim",
        "16",
        "--nhid",
        "16",
        "--f-thres",
        "8",
        "--b-thres",
        "8",
        "--mem-len",
        "0",
    )
    options = (
        "--task",
        "language_modeling",
        "--arch",
        "deq_trellisnet_lm_tiny",
        "--criterion",
        "deq_lm_loss",
    )
    training = ("--tokens-per-sample", "32", *TRAINING, "--max-update", "1", "--disable-validation")
    in_process("fairseq-train", data_bin, *options, *sizes, *training, "--save-dir", tmp_path)
    small = "--contexts 6 20 --batches 2 --beams 1 --tokens 3 --turns 1 --layers 2 --cpu".split()
    words = [
        str(data_bin),
        "--path",
        str(tmp_path / "checkpoint_last.pt"),
        *small,
        "--out",
        str(tmp_path / "out"),
    ]
    assert command.main(words) == 0
    six, twenty = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    # The bytes of the whole cache do not grow with the text: per token they become fewer.
    whole = [entry["ours"]["cache_bytes"] * (entry["context"] + 3 - 1) for entry in (six, twenty)]
    assert 0 < whole[0] == pytest.approx(whole[1])
    assert six["stack"]["cache_bytes"] == twenty["stack"]["cache_bytes"] == 2 * 2 * 16 * 4


def test_the_search_keeps_the_best_continuations():
    search = Search(sentences=1, beam=2, device=torch.device("cpu"))
    log_probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]]).log()
    tokens, rows = search(log_probs)
    assert sorted(zip(rows.tolist(), tokens.tolist())) == [(0, 0), (1, 0)]
    # Row 1 of the next step continues what ranked second, 0.5.
    tokens, rows = search(torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]]).log())
    assert list(zip(rows.tolist(), tokens.tolist())) == [(1, 0), (0, 0)]
