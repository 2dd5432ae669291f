"""Checkpoints load on today's torch, and survive a kill."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from runs import read_perplexity

from fairseq_deq.errors import OptionError


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


@pytest.mark.parametrize("number", [np.float64(2.5), np.float32(2.5), np.int64(2)])
def test_numpy_numbers_are_saved_as_plain_ones(tiny_checkpoint, tmp_path, number):
    state = torch.load(tiny_checkpoint, weights_only=False)
    state["extra_state"]["found"] = [number, {"a": (number,)}]
    path = str(tmp_path / "numbers.pt")
    checkpoint_utils.torch_persistent_save(state, path)
    found = checkpoint_utils.load_checkpoint_to_cpu(path)["extra_state"]["found"]
    assert found == [number, {"a": (number,)}]
    assert type(found[0]) in (int, float)


@pytest.mark.parametrize("value", [SomeObject(), np.float64(1), np.zeros(2), OmegaConf.create({"a": 1})])
def test_what_is_more_than_data_is_refused_in_a_sentence(tiny_checkpoint, tmp_path, value):
    path = with_extra(tiny_checkpoint, tmp_path / "object.pt", value)
    with pytest.raises(OptionError, match=r"holds more than data \(.*fairseq-deq-convert") as refused:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert "\n" not in str(refused.value)


def test_the_variable_that_switches_the_care_of_torch_off_changes_nothing(
    monkeypatch, tiny_checkpoint, tmp_path
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = with_extra(tiny_checkpoint, tmp_path / "object.pt", SomeObject())
    with pytest.raises(OptionError, match="holds more than data"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_only_fairseq_may_load_what_is_allowed_for_it(tmp_path):
    torch.save(argparse.Namespace(), tmp_path / "namespace.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "namespace.pt")


@pytest.mark.parametrize("overrides", [{1: 2}, {None: 1}, [1]])
def test_overrides_that_name_nothing_are_refused(tiny_checkpoint, overrides):
    with pytest.raises(OptionError, match="--model-overrides must name options"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tiny_checkpoint), overrides)


@pytest.fixture(scope="module")
def with_bos(in_process, deq_training, tmp_path_factory):
    """A checkpoint trained with --add-bos-token."""
    folder = tmp_path_factory.mktemp("bos")
    options = ("--add-bos-token", "--save-dir", folder, "--disable-validation")
    in_process("fairseq-train", *deq_training, *options)
    return folder / "checkpoint_last.pt"


def test_evaluation_begins_texts_as_training_did(in_process, with_bos, deq_checkpoint, data_bin, evaluation):
    def evaluate(checkpoint, *options):
        output = in_process("fairseq-eval-lm", data_bin, "--path", checkpoint, *evaluation, *options)
        return read_perplexity(output.checked().text)

    assert evaluate(with_bos) == evaluate(with_bos, "--add-bos-token")
    assert evaluate(deq_checkpoint) == evaluate(deq_checkpoint, "--add-bos-token")
    assert evaluate(with_bos)[0] == evaluate(deq_checkpoint)[0] == 381


def test_streams_do_not_begin_and_say_so(refused, with_bos, data_bin, evaluation):
    options = ("--path", with_bos, *evaluation, "--task", "deq_language_modeling")
    assert "was trained with --add-bos-token" in refused("fairseq-eval-lm", data_bin, *options).text


def test_a_checkpoint_of_translation_is_named(refused, tiny_checkpoint, data_bin, evaluation, tmp_path):
    state = torch.load(tiny_checkpoint, weights_only=False)
    state["cfg"]["model"] |= {"_name": "transformer", "arch": "transformer"}
    state["cfg"]["task"] = {"_name": "translation", "data": "somewhere"}
    torch.save(state, tmp_path / "translation.pt")
    for tool in ("fairseq-eval-lm", "fairseq-interactive", "fairseq-generate"):
        options = ("--path", tmp_path / "translation.pt", *evaluation, "--sample-break-mode", "eos")
        assert "transformer, which is no language model" in refused(tool, data_bin, *options).text
