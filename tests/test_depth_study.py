"""The study of examples/depth in miniature."""

from __future__ import annotations

import argparse
import ast
import json
import shlex

import pytest
from documents import ROOT
from runs import load_script

from fairseq_deq.tools.studies import Results


@pytest.fixture(scope="module")
def study():
    return load_script(ROOT / "examples" / "depth" / "study.py")


@pytest.mark.slow
def test_the_study_evaluates_a_model_in_both_ways_and_repeats_nothing(study, data_bin, tmp_path, capsys):
    options = [str(data_bin), "--out", str(tmp_path), "--updates", "2", "--seeds", "1", "--depths", "12"]
    options += ["--models", "random", "deq"]
    assert study.main(options) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "results.json").read_text())
    names = ("seconds", "mib", "own", "applied-12", "solved-12", "radius")
    assert set(figures) == {f"{model}-1/{name}" for model in ("random", "deq") for name in names}
    assert figures["random-1/own"] == figures["random-1/applied-12"]
    assert figures["deq-1/own"] != figures["deq-1/applied-12"]
    assert figures["deq-1/applied-12"] != figures["random-1/applied-12"]
    # a step of 12 layers takes 3.5 times what an equilibrium takes, one of 23 layers 6.4 times
    assert 5 * figures["deq-1/mib"] < figures["random-1/mib"]
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-1*")}
    assert study.main(options) == 0
    assert capsys.readouterr().out == printed
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-1*")}


def test_the_table_has_means_over_the_seeds_and_the_best_depth(study, tmp_path):
    results = Results(tmp_path / "results.json")
    for seed in (1, 2):
        for name, value in {"own": 30, "seconds": 50, "mib": 7, "radius": 0.5}.items():
            results.figures[f"deq-{seed}/{name}"] = value + seed
        for depth, value in {1: 90, 4: 20, 64: 25}.items():
            results.figures[f"deq-{seed}/solved-{depth}"] = value + seed
            results.figures[f"deq-{seed}/applied-{depth}"] = 100 + seed
    args = argparse.Namespace(depths=[1, 4, 64], models=["deq"], seeds=[1, 2], updates=100)
    lines = study.table(results, args).splitlines()
    row = next(line for line in lines if line.startswith("| deq |"))
    assert row.startswith("| deq | 31.50 (31.00 to 32.00) | 21.50 (21.00 to 22.00) at 4 | 26.50 (26.00 to ")
    assert row.endswith("| 2 (1.5 to 2.5) | 8.5 (8 to 9) | 0.52 (0.51 to 0.52) |")
    assert lines[-2:] == [
        "| deq, applied | 101.50 | 101.50 | 101.50 |",
        "| deq, solved | 91.50 | 21.50 | 26.50 |",
    ]


def test_the_study_shows_trainings_that_differ_in_the_model_and_the_seed_alone(study, capsys):
    assert study.main(["data-bin/wikitext-2", "--out", "depth", "--show"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    trainings = [line for line in lines if line[0] == "fairseq-train"]
    assert len(trainings) == 9
    own = ("layers", "steps", "random-layers")
    for line in trainings:
        assert line[line.index("--save-dir") + 1].endswith(f"-{line[line.index('--seed') + 1]}")
        for option in ("--seed", "--save-dir", *(f"--pretrain-{name}" for name in own)):
            if option in line:
                del line[line.index(option) : line.index(option) + 2]
    assert all(line == trainings[0] for line in trainings)
    evaluations = [line for line in lines if line[0] == "fairseq-eval-lm"]
    assert len(evaluations) == 9 * (1 + 2 * 9)
    changed = [ast.literal_eval(line[-1]) for line in evaluations[1:19]]
    for way, name in ((0, "pretrain_layers"), (1, "f_thres")):
        assert [options[name] for options in changed[way::2]] == [1, 2, 4, 8, 12, 16, 24, 32, 64]
