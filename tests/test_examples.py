"""Every recipe runs in miniature, from training to evaluation, with the commands of its README."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from documents import README, RECIPES, ROOT, commands
from runs import load_script

# The options that make a command small: they follow those of the README, and the last one given holds.
SMALL = (
    *("--max-update", "3", "--max-epoch", "1", "--warmup-updates", "1", "--num-workers", "0", "--cpu"),
    *("--batch-size", "4", "--update-freq", "1", "--disable-validation", "--log-format", "json"),
)
SMALL_DEQ = ("--pretrain-steps", "1", "--pretrain-layers", "2", "--f-thres", "4", "--b-thres", "4")
SMALL_TEXT = ("--tokens-per-sample", "16")
# For a task that draws its data: options, and a column of its own that the validation prints.
SMALL_DRAWN = {
    "copy_memory": (
        ("--blank-len", "6", "--copy-len", "2", "--train-size", "24", "--valid-size", "8"),
        "copy_loss",
    ),
    "word_problem": (("--word-len", "6", "--train-size", "24", "--valid-size", "8"), "last_accuracy"),
}
NARROW = ("--decoder-embed-dim", "16")
ATTENTION = ("--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2")
CUTOFFS = ("--adaptive-input-cutoff", "50,200", "--adaptive-softmax-cutoff", "50,200")


def _moved(command, folder: Path, data_bin: Path) -> list[str]:
    """The arguments of `command`, with data and checkpoints elsewhere."""
    words = list(command.arguments)
    for option in ("--save-dir", "--path", "--tensorboard-logdir"):
        if option in words:
            place = words.index(option) + 1
            words[place] = str(folder / words[place]).replace("_best.pt", "_last.pt")
    place = words.index("--user-dir")
    if words[place + 1] == "fairseq_deq":
        del words[place : place + 2]  # the tests' own functions add it
    else:
        words[place + 1] = str(ROOT / words[place + 1])
    return [str(data_bin) if word.startswith(("data-bin/", "quickstart/bin")) else word for word in words]


def _smaller_training(command) -> tuple[str, ...]:
    architecture, task = command.value("--arch"), command.value("--task")
    small = (*SMALL, *(SMALL_DRAWN[task][0] if task in SMALL_DRAWN else SMALL_TEXT), *NARROW)
    if architecture == "transformer_lm":
        return (*small, *ATTENTION, "--decoder-input-dim", "16", "--decoder-output-dim", "16")
    small += SMALL_DEQ
    if architecture.startswith(("deq_transformer", "deq_trellisnet")):
        small += ("--nhid", "16") if "trellisnet" in architecture else ATTENTION
    small += ("--nout", "16") if command.value("--nout") else ()
    if architecture.startswith("deq_transformer_lm_wt103"):
        small += ("--decoder-head-dim", "8")
    return small + (CUTOFFS if "wt103" in architecture else ())


# What is trained from a checkpoint that was imported runs in tools/test_import_readme.py.
TRAININGS = [
    command
    for recipe in (README, *RECIPES)
    for command in commands(recipe)
    if command.tool == "fairseq-train" and recipe.parent.name != "import"
]


# The widest models.
SLOW = ("checkpoints/wt103-2019", "checkpoints/wt103-3layers-ift")
MINIATURES = [
    pytest.param(t, id=str(t), marks=[pytest.mark.slow] if t.value("--save-dir") in SLOW else [])
    for t in TRAININGS
]


@pytest.mark.parametrize("training", MINIATURES)
def test_the_recipe_runs_in_miniature(training, in_process, data_bin, tmp_path):
    words = _moved(training, tmp_path, data_bin)
    ours = "--user-dir" not in words
    log = in_process("fairseq-train", *words, *_smaller_training(training), plugin=ours).checked().text
    assert 'num_updates": "3"' in log
    for command in commands(training.document):
        path = command.value("--path")
        if path is None or str(Path(path).parent) != training.value("--save-dir"):
            continue
        if command.tool == "fairseq-eval-lm":
            words = _moved(command, tmp_path, data_bin)
            small = ("--tokens-per-sample", "16", "--num-workers", "0", "--cpu")
            assert "Perplexity: " in in_process("fairseq-eval-lm", *words, *small, plugin=ours).checked().text
        elif command.tool == "fairseq-validate":
            words = _moved(command, tmp_path, data_bin)
            options, column = SMALL_DRAWN[str(command.value("--task"))]
            words += [*options, "--cpu"]
            assert column in in_process("fairseq-validate", *words, plugin=ours).checked().text


@pytest.fixture(scope="module")
def study():
    return load_script(ROOT / "examples" / "wikitext-2" / "study.py")


@pytest.mark.slow
def test_the_study_picks_the_best_of_its_search_and_repeats_nothing(study, data_bin, tmp_path, capsys):
    options = [str(data_bin), "--out", str(tmp_path), "--updates", "2", "--final-updates", "3"]
    options += ["--models", "deq", "--lr", "0.001", "0.01", "--dropout", "0"]
    assert study.main(options) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) >= {"deq-2-0.001-0", "deq-2-0.01-0"}
    best = min(("0.001", "0.01"), key=lambda lr: results[f"deq-2-{lr}-0"]["perplexity"])
    assert set(results) == {"deq-2-0.001-0", "deq-2-0.01-0", f"deq-3-{best}-0"}
    assert all(1 < result["perplexity"] < 2000 and result["seconds"] > 0 for result in results.values())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert study.main(options) == 0
    assert capsys.readouterr().out == printed
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.slow
def test_the_study_measures_the_memory_of_the_phase_that_was_trained_last(study, data_bin, tmp_path):
    options = [str(data_bin), "--out", str(tmp_path), "--updates", "1", "--final-updates", "3"]
    options += ["--models", "deq", "tied", "--lr", "0.001", "--dropout", "0"]
    assert study.main(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    # an equilibrium keeps one evaluation of the layer, a stack all 12
    assert 0 < 2 * results["deq-3-0.001-0"]["mib"] < results["tied-3-0.001-0"]["mib"]


def test_the_study_shows_equal_commands(study, capsys):
    assert study.main(["data-bin/wikitext-2", "--out", "study", "--show"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    trainings = [line for line in lines if line[0] == "fairseq-train"]
    assert len(trainings) == 3 * 5
    for option in ("--tokens-per-sample", "--batch-size", "--seed", "--warmup-updates", "--adam-betas"):
        assert len({line[line.index(option) + 1] for line in trainings}) == 1
    searched = [
        {(line[line.index("--lr") + 1], line[line.index("--dropout") + 1]) for line in trainings[i : i + 4]}
        for i in (0, 5, 10)
    ]
    assert searched[0] == searched[1] == searched[2]
    assert len(searched[0]) == 4
