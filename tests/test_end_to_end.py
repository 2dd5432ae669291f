"""The whole way through fairseq's own tools on real text: train, resume, validate, evaluate, generate."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from runs import (
    check_adaptive,
    check_resuming,
    continuations,
    json_lines,
    read_losses,
    read_perplexity,
    read_weights,
)

from fairseq_deq.jacobian import jacobian_penalty

TINY = (
    *("--task", "language_modeling", "--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--decoder-attention-heads", "2"),
    *("--optimizer", "adam", "--lr", "0.005", "--clip-norm", "0.5", "--tokens-per-sample", "32"),
    *("--batch-size", "8", "--required-batch-size-multiple", "1", "--num-workers", "0", "--cpu"),
    *("--log-format", "json", "--log-interval", "2", "--seed", "3"),
)
STATISTICS = ("f_nfe", "f_lane_nfe", "f_res", "f_conv", "b_nfe", "b_lane_nfe", "b_res", "b_conv")


def _train(in_process, data_bin: Path, folder: Path, *more: str, options: tuple[str, ...] = ()) -> str:
    arguments = (data_bin, *TINY, "--save-dir", folder, *options, *more)
    return in_process("fairseq-train", *arguments).checked().text


@pytest.fixture(scope="module")
def trained(in_process, data_bin, tmp_path_factory):
    """A model trained for 30 updates, 10 of them as a stack, and the log of the run."""
    folder = tmp_path_factory.mktemp("deq")
    log = _train(
        in_process,
        data_bin,
        folder,
        *"--max-update 30 --pretrain-steps 10 --pretrain-layers 2 --tensorboard-logdir".split(),
        str(folder / "tensorboard"),
    )
    return folder, log


def test_training_learns_and_logs_both_solves(trained):
    _, log = trained
    lines = [line for line in json_lines(log) if "loss" in line]
    first, last = float(lines[0]["loss"]), float(lines[-1]["loss"])
    assert last < first - 1.0
    assert "f_nfe" not in lines[0]  # a stack has no solve
    equilibrium = [line for line in lines if "f_nfe" in line]
    for name in STATISTICS:
        assert all(math.isfinite(float(line[name])) for line in equilibrium), name
    assert 1 < float(equilibrium[-1]["f_lane_nfe"]) <= float(equilibrium[-1]["f_nfe"]) <= 30
    assert 0.9 < float(equilibrium[-1]["f_conv"]) <= 1
    assert 0.9 < float(equilibrium[-1]["b_conv"]) <= 1


def test_perplexity_is_that_of_the_loss_alone(trained):
    _, log = trained
    for line in json_lines(log):
        if "loss" in line:
            assert float(line["ppl"]) == pytest.approx(2 ** float(line["loss"]), rel=2e-3)


def test_tensorboard_holds_the_solver_columns(trained):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(trained[0] / "tensorboard" / "train_inner"))
    events.Reload()
    assert set(STATISTICS) <= set(events.Tags()["scalars"])


def test_validation_in_training_fairseq_validate_and_eval_lm_agree(trained, in_process, data_bin):
    folder, log = trained
    valid = next(float(line["valid_loss"]) for line in reversed(json_lines(log)) if "valid_loss" in line)
    path = ("--path", folder / "checkpoint_last.pt")
    checked = (
        in_process(
            "fairseq-validate",
            data_bin,
            *"--task language_modeling".split(),
            *path,
            *"--batch-size 8 --required-batch-size-multiple 1".split(),
            *"--num-workers 0 --cpu --valid-subset valid".split(),
        )
        .checked()
        .text
    )
    (again,) = re.findall(r"loss ([\d.]+) \|", checked)[-1:]
    assert float(again) == pytest.approx(valid, abs=2e-3)
    tokens, perplexity = read_perplexity(
        in_process(
            "fairseq-eval-lm",
            data_bin,
            *path,
            *"--gen-subset valid --tokens-per-sample 32 --batch-size 4 --num-workers 0 --cpu".split(),
        )
        .checked()
        .text
    )
    assert math.log2(perplexity) == pytest.approx(valid, abs=2e-3)
    words = (Path(__file__).parent / "data" / "text" / "valid.txt").read_text(encoding="utf-8")
    assert tokens == len(words.split()) + len(words.splitlines())


def test_solver_options_can_be_changed_at_evaluation(trained, in_process, data_bin):
    def evaluate(overrides: str) -> float:
        return read_perplexity(
            in_process(
                "fairseq-eval-lm",
                data_bin,
                "--path",
                trained[0] / "checkpoint_last.pt",
                *"--gen-subset test --tokens-per-sample 32".split(),
                *"--num-workers 0 --cpu --model-overrides".split(),
                overrides,
            )
            .checked()
            .text
        )[1]

    converged, crude = evaluate("{'f_thres': 60, 'f_eps': 1e-5}"), evaluate("{'f_thres': 2}")
    assert evaluate("{}") == pytest.approx(converged, rel=1e-3)
    assert abs(crude - converged) > 1e-2 * converged


@pytest.mark.parametrize("stop", [pytest.param(6, marks=pytest.mark.slow), 14])
def test_resuming_on_either_side_of_the_switch_gives_the_uninterrupted_run(
    stop, in_process, data_bin, tmp_path
):
    options = (
        *("--pretrain-steps", "10", "--pretrain-layers", "4", "--pretrain-random-layers"),
        *("--disable-validation", "--dropout", "0.1", "--wnorm"),
    )
    check_resuming(partial(_train, in_process, data_bin, options=options), tmp_path, stop, 16)


def test_adaptive_input_and_softmax_train_and_evaluate(in_process, data_bin, tmp_path):
    check_adaptive(in_process, data_bin, tmp_path, partial(_train, in_process, data_bin))


@pytest.mark.parametrize("gradient", ["phantom", "jfb", "unroll"])
def test_every_gradient_trains(gradient, in_process, data_bin, tmp_path):
    log = _train(
        in_process,
        data_bin,
        tmp_path,
        "--gradient",
        gradient,
        *"--max-update 8 --disable-validation --f-thres 8".split(),
    )
    found = read_losses(log)
    assert found[-1] < found[0]


def _penalty(path: Path, data_bin: Path) -> float:
    """The Jacobian penalty of a checkpoint at the equilibria of the validation text."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(data_bin), "f_thres": 60}
    )
    task.load_dataset("valid")
    sample = task.dataset("valid").collater([task.dataset("valid")[i] for i in range(4)])
    torch.manual_seed(0)
    _, extra = models[0].eval()(**sample["net_input"])
    values = [jacobian_penalty(*e.taped, probes=4) for e in extra["equilibria"]]  # type: ignore[misc]
    return torch.stack(values).mean().item()


def test_the_jacobian_penalty_trains_and_falls(in_process, data_bin, tmp_path):
    options = "--max-update 8 --update-freq 2 --f-thres 12 --b-thres 12 --keep-converged 0".split()
    penalised = "--jac-loss-weight 2 --jac-loss-freq 0.8 --jac-incremental 5 --spectral-radius 8".split()
    log = _train(in_process, data_bin, tmp_path / "with", *options, *penalised)
    plain = _train(in_process, data_bin, tmp_path / "without", *options)
    lines, without = json_lines(log), json_lines(plain)
    logged = [float(line["jac"]) for line in lines if "jac" in line]
    assert logged[-1] < 0.5 * logged[0]
    assert not any("jac" in name or "sradius" in name for line in without for name in line)
    for line in lines:  # cross-entropy alone
        if "loss" in line:
            assert float(line["ppl"]) == pytest.approx(2 ** float(line["loss"]), rel=2e-3)
    radii = [float(line["valid_sradius"]) for line in lines if "valid_loss" in line]
    assert all(0 < radius < 2 for radius in radii)
    assert radii
    assert not any("valid_jac" in line or "sradius" in line for line in lines)
    found, reference = (
        _penalty(tmp_path / name / "checkpoint_last.pt", data_bin) for name in ("with", "without")
    )
    assert found < 0.5 * reference
    assert reference > 0.05


def test_a_trellisnet_trains_with_the_jacobian_penalty_and_resumes_to_the_same(
    in_process, data_bin, tmp_path
):
    options = (
        *"--task language_modeling --arch deq_trellisnet_lm_tiny --criterion deq_lm_loss --nhid 16".split(),
        *"--decoder-embed-dim 16 --optimizer adam --lr 0.005 --tokens-per-sample 24 --batch-size 8".split(),
        *"--num-workers 0 --cpu --log-format json --log-interval 1 --disable-validation --f-thres 6".split(),
        *"--gradient jfb --wnorm --subseq-len 10 --jac-loss-weight 1 --jac-loss-freq 0.5".split(),
    )

    def train(name: str, updates: int) -> list[dict[str, str]]:
        save = ("--save-dir", tmp_path / name, "--max-update", str(updates))
        return json_lines(in_process("fairseq-train", data_bin, *options, *save).checked().text)

    def columns(lines: list[dict[str, str]]) -> dict[str, str | None]:
        return {line["num_updates"]: line.get("jac") for line in lines if "num_updates" in line}

    whole, first, second = train("whole", 6), train("parts", 3), train("parts", 6)
    assert columns(first) | columns(second) == columns(whole)
    logged = list(columns(whole).values())
    assert None in logged
    assert any(value is not None and 0 < float(value) < 10 for value in logged)
    weights = read_weights(tmp_path / "whole" / "checkpoint_last.pt")
    for name, tensor in read_weights(tmp_path / "parts" / "checkpoint_last.pt").items():
        assert torch.equal(tensor, weights[name]), name


def test_interactive_continues_prompts_and_warns_of_unknown_words(trained, command, data_bin):
    checkpoint = trained[0] / "checkpoint_last.pt"
    output = continuations(command, data_bin, checkpoint, "the people of\nxyzzy plugh\n")
    assert "2 of 2 words are not in the dictionary" in output
