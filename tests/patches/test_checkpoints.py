"""Checkpoints load on today's torch."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils


class SomeObject:
    """Nothing that fairseq saves."""


def with_extra(checkpoint, path, value):
    """A copy of `checkpoint` at `path` that holds `value` as well."""
    state = torch.load(checkpoint, weights_only=False)
    state["extra_state"]["found"] = value
    torch.save(state, path)
    return str(path)


def test_a_run_with_sgd_resumes(in_process, tiny_training, tmp_path):
    # --optimizer sgd has no dataclass, so the checkpoint holds an argparse.Namespace
    training = (*tiny_training, "--optimizer", "sgd", "--save-dir", tmp_path, "--disable-validation")
    in_process("fairseq-train", *training, "--max-update", "1")
    in_process("fairseq-train", *training, "--max-update", "2")
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert isinstance(state["cfg"]["optimizer"], argparse.Namespace)
    assert state["optimizer_history"][-1]["num_updates"] == 2


@pytest.mark.parametrize("number", [np.float64(2.5), np.float32(2.5), np.int64(2), np.array([1.0, 2.0])])
def test_numpy_numbers_in_a_checkpoint_load(tiny_checkpoint, tmp_path, number):
    path = with_extra(tiny_checkpoint, tmp_path / "numbers.pt", number)
    found = checkpoint_utils.load_checkpoint_to_cpu(path)["extra_state"]["found"]
    assert np.array_equal(found, number)


def test_arbitrary_objects_stay_refused(tiny_checkpoint, tmp_path):
    path = with_extra(tiny_checkpoint, tmp_path / "object.pt", SomeObject())
    with pytest.raises(pickle.UnpicklingError, match="SomeObject"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_only_fairseq_may_load_what_is_allowed_for_it(tmp_path):
    torch.save(argparse.Namespace(), tmp_path / "namespace.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "namespace.pt")
