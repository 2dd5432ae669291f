"""The study of examples/state-tracking in miniature."""

from __future__ import annotations

import argparse
import json
import shlex

import pytest
from documents import ROOT
from runs import load_script

from fairseq_deq.tools.studies import Results

SMALL = (
    *("--seeds", "1", "--lengths", "8", "4", "--word-len", "6", "--layers", "3", "--words", "16"),
    *("--pretrain-updates", "3", "--equilibrium-updates", "2"),
)


@pytest.fixture(scope="module")
def study():
    return load_script(ROOT / "examples" / "state-tracking" / "study.py")


@pytest.mark.slow
def test_one_checkpoint_is_evaluated_in_every_way_and_nothing_is_repeated(study, tmp_path, capsys):
    assert study.main(["--out", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "results.json").read_text())
    ways = ("applied 3 times", "applied 6 times", "applied 12 times", "equilibrium")
    assert set(figures) == {"1/seconds", *(f"1/{way}/{length}" for way in ways for length in (4, 8))}
    assert all(0 <= value <= 1 for name, value in figures.items() if name != "1/seconds")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix != ".png"}
    assert study.main(["--out", str(tmp_path), *SMALL]) == 0
    assert capsys.readouterr().out == printed
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix != ".png"}


def test_the_commands_differ_in_how_the_checkpoint_is_evaluated_alone(study, capsys):
    assert study.main(["--out", "states", "--show", *SMALL]) == 0
    training, *evaluations = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert training[0] == "fairseq-train"
    assert training[training.index("--pretrain-layers") + 1] == "3"
    assert training[training.index("--max-update") + 1] == "5"
    assert len(evaluations) == 4 * 2
    assert {line[line.index("--path") + 1] for line in evaluations} == {"states/1/checkpoint_last.pt"}
    assert {line[line.index("--word-len") + 1] for line in evaluations} == {"4", "8"}
    assert len({line[line.index("--model-overrides") + 1] for line in evaluations}) == 4


def test_the_table_has_means_over_the_seeds(study, tmp_path):
    args = argparse.Namespace(seeds=[1, 2], lengths=[16, 32], layers=16)
    results = Results(tmp_path / "results.json")
    for seed in args.seeds:
        for way in study.ways(args.layers):
            for length in args.lengths:
                results.figures[f"{seed}/{way}/{length}"] = 1.0 if way == study.SOLVED else 0.2 * seed
    lines = study.table(args, results).splitlines()
    assert lines[0] == "| the same weights | 16 | 32 |"
    assert lines[2] == "| applied 16 times | 0.300 (0.200 to 0.400) | 0.300 (0.200 to 0.400) |"
    assert lines[-1] == "| equilibrium | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) |"
