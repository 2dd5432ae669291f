"""What solves teach is part of a run: resumed, validated and evaluated, it is the same.

On two processes too, as test_workers.py asserts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from runs import differences, read_perplexity, resumed_state
from selection import few_of
from tasks.known import ADAM, FAMILIES, KNOWLEDGE, TASK, check_known, read_knowledge

STOPS = (1, 10, 11, 21)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def whole(in_process, data_bin, tmp_path_factory):
    """Trains a family once: the arguments of the run, and its folder, with checkpoints after every update."""

    @functools.cache
    def train(family):
        folder = tmp_path_factory.mktemp(family)
        arguments = (data_bin, *TASK, *ADAM, "--batch-size", "8", *FAMILIES[family], "--dropout", "0.1")
        options = ("--save-dir", folder, "--save-interval-updates", "1")
        in_process("fairseq-train", *arguments, *options).checked()
        return arguments, folder

    return train


@every_family
def test_a_run_of_23_updates_has_renewed_its_knowledge_three_times(family, whole):
    check_known(whole(family)[1] / "checkpoint_last.pt")


@pytest.mark.parametrize(("family", "stop"), few_of((family, stop) for family in FAMILIES for stop in STOPS))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(family, stop, whole, in_process, tmp_path):
    arguments, folder = whole(family)
    (first,) = folder.glob(f"checkpoint_*_{stop}.pt")
    log = (
        in_process("fairseq-train", *arguments, "--save-dir", tmp_path, "--restore-file", first)
        .checked()
        .text
    )
    assert f"@ {stop} updates" in log
    assert differences(resumed_state(tmp_path), resumed_state(folder)) == []


@every_family
def test_what_is_known_matters_to_the_run(family, whole, in_process, tmp_path):
    """Or resuming without it would have gone unseen."""
    arguments, folder = whole(family)
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


@every_family
def test_a_loaded_model_knows_what_the_checkpoint_knows(family, whole, data_bin):
    path = whole(family)[1] / "checkpoint_last.pt"
    model, _ = _loaded(path, data_bin)
    for name, tensor in read_knowledge(path).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.decoder.knowledge.learned_start.is_known
    assert model.decoder.knowledge.learned_preconditioner.preconditioner() is not None


@every_family
def test_evaluation_uses_it(family, whole, in_process, data_bin, tmp_path):
    _, folder = whole(family)
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
