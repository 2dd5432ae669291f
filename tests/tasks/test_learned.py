"""What solves teach is part of a run: resumed, on two processes, validated and evaluated, it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from runs import differences, json_lines, read_losses, read_perplexity, read_weights, resumed_state
from tasks.pair import Pair, train_alone

TASK = (
    *("--task", "deq_language_modeling", "--criterion", "deq_lm_loss", "--tokens-per-sample", "16"),
    *("--num-workers", "0", "--cpu", "--seed", "3", "--log-format", "json", "--log-interval", "1"),
    *("--disable-validation", "--mem-len", "8", "--decoder-embed-dim", "16", "--max-update", "23"),
)
FAMILIES = {
    "transformer": (
        *("--arch", "deq_transformer_lm_tiny", "--decoder-ffn-embed-dim", "32"),
        *("--decoder-attention-heads", "2"),
    ),
    "trellis": ("--arch", "deq_trellisnet_lm_tiny", "--nhid", "8"),
}
FAMILIES["two layers"] = (*FAMILIES["transformer"], "--decoder-layers", "2")
# Renewed after updates 1, 11 and 21.
RENEWALS = 3
KNOWLEDGE = ("learned_start", "learned_preconditioner")


def _knowledge(path: Path) -> dict[str, torch.Tensor]:
    weights = read_weights(path)
    found = {name: tensor for name, tensor in weights.items() if any(part in name for part in KNOWLEDGE)}
    assert len(found) >= 8
    return found


def _check_known(path: Path) -> None:
    known = _knowledge(path)
    for part, tensor in (("learned_start", "weight"), ("learned_preconditioner", "left")):
        assert known[f"decoder.knowledge.{part}.renewals"] == RENEWALS
        assert known[f"decoder.knowledge.{part}.{tensor}"].norm() > 1e-3


# ---------------------------------------------------------------------- one process

TRAINED = (*TASK, "--optimizer", "adam", "--lr", "0.01", "--clip-norm", "0.5", "--batch-size", "8")


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, in_process, data_bin, tmp_path_factory):
    """The arguments of a run, and its folder, with checkpoints after every update."""
    folder = tmp_path_factory.mktemp(request.param)
    arguments = (data_bin, *TRAINED, *FAMILIES[request.param], "--dropout", "0.1")
    in_process("fairseq-train", *arguments, "--save-dir", folder, "--save-interval-updates", "1").checked()
    return arguments, folder


def test_a_run_of_23_updates_has_renewed_its_knowledge_three_times(whole):
    _check_known(whole[1] / "checkpoint_last.pt")


@pytest.mark.parametrize("stop", [1, 10, 11, 21])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop, whole, in_process, tmp_path):
    arguments, folder = whole
    (first,) = folder.glob(f"checkpoint_*_{stop}.pt")
    log = (
        in_process("fairseq-train", *arguments, "--save-dir", tmp_path, "--restore-file", first)
        .checked()
        .text
    )
    assert f"@ {stop} updates" in log
    assert differences(resumed_state(tmp_path), resumed_state(folder)) == []


def test_what_is_known_matters_to_the_run(whole, in_process, tmp_path):
    """Or resuming without it would have gone unseen."""
    arguments, folder = whole
    (first,) = folder.glob("checkpoint_*_11.pt")
    state = torch.load(first, weights_only=False)
    for name in [name for name in state["model"] if any(part in name for part in KNOWLEDGE)]:
        del state["model"][name]
    torch.save(state, tmp_path / "old.pt")
    log = (
        in_process("fairseq-train", *arguments, "--save-dir", tmp_path, "--restore-file", tmp_path / "old.pt")
        .checked()
        .text
    )
    assert "@ 11 updates" in log  # an old checkpoint is no reason to complain
    assert differences(resumed_state(tmp_path)["weights"], resumed_state(folder)["weights"]) != []


def _loaded(path: Path, data_bin: Path) -> Any:
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], {"data": str(data_bin)})
    task.load_dataset("valid")
    return models[0].eval(), task


def test_a_loaded_model_knows_what_the_checkpoint_knows(whole, data_bin):
    model, _ = _loaded(whole[1] / "checkpoint_last.pt", data_bin)
    for name, tensor in _knowledge(whole[1] / "checkpoint_last.pt").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.decoder.knowledge.learned_start.is_known
    assert model.decoder.knowledge.learned_preconditioner.preconditioner() is not None


def test_evaluation_uses_it(whole, in_process, data_bin, tmp_path):
    _, folder = whole
    state = torch.load(folder / "checkpoint_last.pt", weights_only=False)
    for name in [name for name in state["model"] if any(part in name for part in KNOWLEDGE)]:
        del state["model"][name]
    torch.save(state, tmp_path / "old.pt")
    work = []
    for path in (folder / "checkpoint_last.pt", tmp_path / "old.pt"):
        model, _ = _loaded(path, data_bin)
        with torch.no_grad():
            _, extra = model(torch.arange(4, 100).view(4, 24))
        lanes, _, computed, _, converged, _ = extra["forward_stats"].sums.tolist()
        assert converged == lanes
        work.append(computed / lanes)
        options = (*TASK[:2], *TASK[4:6], "--num-workers", "0", "--cpu", "--gen-subset", "valid")
        run = in_process("fairseq-eval-lm", data_bin, "--path", path, *options).checked()
        assert 1 < read_perplexity(run.text)[1] < 1e5
    assert work[0] < work[1]


# ---------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def pair():
    """Two processes that are started once."""
    processes = Pair()
    yield processes
    processes.stop()


# Solved to the end, so that states do not depend on how they were reached: the first updates are a stack's,
# since new weights do not converge. The keeper's penalty has random probes.
EXACT = (
    *("--f-eps", "1e-9", "--b-eps", "1e-9", "--f-thres", "200", "--b-thres", "200", "--keep-converged", "0"),
    *("--optimizer", "sgd", "--lr", "0.5", "--pretrain-steps", "8"),
)


@pytest.mark.parametrize(
    "family",
    [
        "transformer",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "transformer"),
    ],
)
def test_two_processes_learn_what_one_with_the_doubled_batch_learns(
    family, pair, in_process, data_bin, tmp_path
):
    arguments = (data_bin, *TASK, *FAMILIES[family], *EXACT)
    two = pair.train(*arguments, "--batch-size", "2", "--save-dir", tmp_path / "two", dtype="float64")
    one = train_alone(
        in_process, *arguments, "--batch-size", "4", "--save-dir", tmp_path / "one", dtype="float64"
    )
    paths = [tmp_path / name / "checkpoint_last.pt" for name in ("one", "two")]
    for path in paths:
        _check_known(path)
    ours, theirs = (read_weights(path) for path in paths)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if "learned_preconditioner" in name:
            continue  # its probes are drawn for the rows of a process
        scale = 1 + float(weight.double().abs().max())
        assert torch.allclose(theirs[name].double(), weight.double(), rtol=0, atol=1e-4 * scale), name
    known = [
        {n.split(".")[-1]: t.double() for n, t in _knowledge(p).items() if "preconditioner" in n}
        for p in paths
    ]
    assert known[0]["positions"] == known[1]["positions"] > 0
    jacobians = [torch.linalg.lstsq(k["gram"], k["cross"]).solution for k in known]
    assert (jacobians[0] - jacobians[1]).norm() < 0.5 * jacobians[0].norm()
    assert read_losses(two) == pytest.approx(read_losses(one), abs=2e-3)
    assert len(json_lines(two)) >= 23
    shares = [float(line["f_conv"]) for log in (one, two) for line in json_lines(log) if "f_conv" in line]
    assert min(shares) == 1


@pytest.mark.parametrize("stop", [pytest.param(10, marks=pytest.mark.slow), 11])
def test_two_processes_resume_bit_for_bit_with_what_they_know(stop, pair, data_bin, tmp_path):
    arguments = (data_bin, *TRAINED[:-1], "2", *FAMILIES["transformer"], "--update-freq", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pair.train(*arguments, "--save-dir", whole, "--save-interval-updates", "1")
    (first,) = whole.glob(f"checkpoint_*_{stop}.pt")
    log = pair.train(*arguments, "--save-dir", parts, "--restore-file", first)
    assert f"@ {stop} updates" in log
    _check_known(whole / "checkpoint_last.pt")
    assert differences(resumed_state(parts), resumed_state(whole)) == []
