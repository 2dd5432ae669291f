"""Validation after update N evaluates the model as of N."""

import argparse

import pytest

from fairseq_deq.models.deq_decoder import DEQDecoder
from fairseq_deq.tasks._careful import CarefulTask


@pytest.fixture
def phases(monkeypatch):
    """What the decoder sees in each forward pass: (training, updates finished, pretraining)."""
    seen = []
    forward = DEQDecoder.forward

    def recording(self, *args, **kwargs):
        seen.append((self.training, self.num_updates, self.pretraining))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DEQDecoder, "forward", recording)
    return seen


def test_validation_and_the_loaded_checkpoint_see_the_same_phase(
    in_process, data_bin, phases, deq_training, evaluation, tmp_path
):
    training = (*deq_training, "--save-dir", tmp_path, "--pretrain-steps", "1", "--max-update", "2")
    in_process("fairseq-train", *training, "--validate-interval-updates", "1")
    assert list(dict.fromkeys(phases)) == [
        (True, 0, True),
        (False, 1, True),  # the weights are still those of a stack
        (True, 1, False),
        (False, 2, False),
    ]
    phases.clear()
    path = tmp_path / "checkpoint_last.pt"
    in_process("fairseq-validate", data_bin, "--path", path, *evaluation, "--batch-size", "8")
    assert set(phases) == {(False, 2, False)}


class Optimizer:
    def step(self):
        pass


class Model:
    def __init__(self, **attributes):
        vars(self).update(attributes, announced=[])

    def set_num_updates(self, number):
        self.announced.append(number)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("attributes", "announced"), [({}, []), ({"counts_finished_updates": True}, [8])])
def test_only_models_that_count_finished_updates_are_told(attributes, announced):
    model = Model(**attributes)
    CarefulTask(argparse.Namespace()).optimizer_step(Optimizer(), model=model, update_num=7)
    assert model.announced == announced  # type: ignore[attr-defined]
