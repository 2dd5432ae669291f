"""f of two layers the whole way: train, resume, evaluate, generate, and every tool that reads it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
from runs import check_resuming, continuations, json_lines, read_losses, read_perplexity, read_weights

from fairseq_deq.tools import anytime, score
from fairseq_deq.tools.benchmark import command as benchmark
from fairseq_deq.tools.benchmark_generation import command as generation
from fairseq_deq.tools.diagnose import command as diagnose
from fairseq_deq.tools.plot import command as plot

TWO_LAYERS = (
    *("--task", "deq_language_modeling", "--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"),
    *("--decoder-attention-heads", "2", "--f-thres", "12", "--b-thres", "12", "--mem-len", "12"),
    *("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "0.5", "--tokens-per-sample", "24"),
    *("--batch-size", "8", "--num-workers", "0", "--cpu", "--seed", "3"),
    *("--log-format", "json", "--log-interval", "1"),
)
EVALUATION = (
    *("--task", "deq_language_modeling", "--tokens-per-sample", "24", "--batch-size", "4"),
    *("--num-workers", "0", "--cpu"),
)


def _train(in_process, data_bin: Path, folder: Path, *more: str, options: tuple[str, ...] = ()) -> str:
    arguments = (data_bin, *TWO_LAYERS, "--save-dir", folder, *options, *more)
    return in_process("fairseq-train", *arguments).checked().text


@pytest.fixture(scope="module")
def trained(in_process, data_bin, tmp_path_factory):
    """A model trained with everything that looks at the Jacobian, and the log of the run."""
    folder = tmp_path_factory.mktemp("two-layers")
    options = "--max-update 14 --pretrain-steps 4 --wnorm --subseq-len 10 --decoder-normalize-before".split()
    options += "--jac-loss-weight 0.5 --jac-loss-freq 0.7 --spectral-radius 4 --preconditioner-rank 8".split()
    log = _train(in_process, data_bin, folder, *options)
    (folder / "train.log").write_text(log, encoding="utf-8")
    return folder / "checkpoint_last.pt", log


def test_training_learns_and_logs_what_it_was_asked_for(trained):
    path, log = trained
    lines = json_lines(log)
    losses = read_losses(log)
    assert losses[-1] < losses[0] - 0.5
    solved = [line for line in lines if "f_nfe" in line]
    assert len(solved) >= 10
    assert all(1 < float(line["f_nfe"]) <= 12 and 1 < float(line["b_nfe"]) <= 12 for line in solved)
    assert any(0 < float(line["jac"]) < 10 for line in solved if "jac" in line)
    assert all(0 < float(line["valid_sradius"]) < 5 for line in lines if "valid_sradius" in line)
    assert any("valid_sradius" in line for line in lines)
    assert {"decoder.layer.layers.0.qkv.weight_v", "decoder.layer.layers.1.qkv.weight_v"} <= set(
        read_weights(path)
    )


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_resuming_on_either_side_of_the_switch_gives_the_uninterrupted_run(
    stop, in_process, data_bin, tmp_path
):
    options = ("--pretrain-steps", "4", "--disable-validation", "--dropout", "0.1", "--wnorm")
    check_resuming(partial(_train, in_process, data_bin, options=options), tmp_path, stop, 9)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["shine", "phantom", "jfb", "unroll"])
def test_every_gradient_trains_and_evaluates(gradient, in_process, data_bin, tmp_path):
    log = _train(
        in_process, data_bin, tmp_path, "--gradient", gradient, *"--max-update 6 --disable-validation".split()
    )
    found = read_losses(log)
    assert found[-1] < found[0]
    path = ("--path", tmp_path / "checkpoint_last.pt")
    text = in_process("fairseq-eval-lm", data_bin, *path, *EVALUATION, "--gen-subset", "valid").checked().text
    assert 1 < read_perplexity(text)[1] < 2 ** found[0]


def test_evaluation_agrees_with_validation_and_a_budget_can_be_given(trained, in_process, data_bin):
    path, log = trained
    valid = next(float(line["valid_loss"]) for line in reversed(json_lines(log)) if "valid_loss" in line)

    def evaluated(*options: str) -> float:
        arguments = (data_bin, "--path", path, *EVALUATION, "--batch-size", "8", "--gen-subset", "valid")
        return math.log2(
            read_perplexity(in_process("fairseq-eval-lm", *arguments, *options).checked().text)[1]
        )

    assert evaluated() == pytest.approx(valid, abs=5e-3)
    assert abs(evaluated("--model-overrides", "{'f_thres': 1}") - valid) > 1e-2


def test_interactive_continues_prompts(trained, in_process, data_bin):
    continuations(in_process, data_bin, trained[0], "the people of\nthe United\n")


def test_score_gives_every_word_its_share(trained, data_bin, tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("the people of the United States\nthe people\n", encoding="utf-8")
    assert score.main([str(data_bin), "--path", str(trained[0]), "--input", str(lines), "--cpu"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    words = [float(row[1]) for row in rows if row[0].startswith("W-")]
    total = next(row for row in rows if row[0] == "T")
    assert len(words) == 7 + 3
    assert float(total[1]) == pytest.approx(sum(words), abs=1e-2)


def test_anytime_counts_evaluations_of_both_layers_as_one(trained, data_bin, tmp_path):
    numbers = tmp_path / "anytime.json"
    words = [str(data_bin), "--path", str(trained[0]), "--gen-subset", "test", *EVALUATION]
    assert anytime.main([*words, "--json", str(numbers)]) == 0
    table = json.loads(numbers.read_text())["budgets"]
    assert [line["budget"] for line in table] == [1, 2, 4, 8, 12]
    assert 0 < table[-1]["residual"] < 0.1 * table[0]["residual"]
    assert table[-1]["evaluations"] <= 12


def test_diagnose_finds_it_causal_and_measures_its_spectrum(trained, data_bin, tmp_path):
    page, numbers = tmp_path / "report.html", tmp_path / "report.json"
    words = [str(trained[0]), str(data_bin), "--out", str(page), "--json", str(numbers)]
    assert diagnose.main([*words, "--tokens", "96", "--rows", "4"]) in (0, 1)
    assert "Causal, and independent of batch mates" in page.read_text(encoding="utf-8")
    assert json.loads(numbers.read_text())


@pytest.mark.slow
def test_the_benchmark_of_a_step_knows_its_truth(trained, data_bin, tmp_path):
    out = tmp_path / "step"
    words = [str(data_bin), "--path", str(trained[0]), "--tokens", "12", "--batch", "3", "--rounds", "1"]
    rows = ("anderson+ift", "stack of 12")
    assert (
        benchmark.main([*words, "--rtol", "1e-5", "--only", rows[0], "--only", rows[1], "--out", str(out)])
        == 0
    )
    figures = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert set(figures) == set(rows)
    assert figures["anderson+ift"]["gradient_error"] < 1e-3


@pytest.mark.slow
def test_the_benchmark_of_generation_counts_a_cache_a_layer(trained, data_bin, tmp_path):
    out = tmp_path / "generation"
    words = [str(data_bin), "--path", str(trained[0]), "--cpu", "--out", str(out)]
    words += "--contexts 6 --batches 2 --beams 2 --tokens 3 --turns 1 --layers 5 --threads 1".split()
    assert generation.main(words) == 0
    (entry,) = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    assert entry["ours"]["cache_bytes"] == 2 * 2 * 16 * 4
    assert entry["stack"]["cache_bytes"] == 5 * 2 * 16 * 4


@pytest.mark.slow
def test_its_training_is_drawn(trained, tmp_path):
    picture = tmp_path / "training.png"
    assert plot.main([f"two={trained[0].parent / 'train.log'}", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 5000
