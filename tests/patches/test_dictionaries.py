"""A checkpoint is used with the dictionary it was trained with, or not at all."""

import re
import shutil

import pytest
import torch


@pytest.fixture
def reordered(data_bin, tmp_path):
    """A data folder whose dictionary has the same words, two of them swapped."""
    folder = shutil.copytree(data_bin, tmp_path / "reordered")
    lines = (folder / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))
    return folder


@pytest.fixture
def recounted(data_bin, tmp_path):
    """A data folder whose dictionary has the same words with other counts."""
    folder = shutil.copytree(data_bin, tmp_path / "recounted")
    text = (folder / "dict.txt").read_text()
    (folder / "dict.txt").write_text(re.sub(r" \d+$", " 1", text, flags=re.M))
    return folder


@pytest.mark.parametrize("tool", ["fairseq-eval-lm", "fairseq-validate", "fairseq-interactive"])
def test_the_same_words_in_another_order_are_refused(refused, tool, reordered, tiny_checkpoint, evaluation):
    options = ("--path", tiny_checkpoint, *evaluation, "--batch-size", "1")
    sentence = refused(tool, reordered, *options).text
    assert "has other words or another order" in sentence
    assert str(reordered) in sentence


def test_training_does_not_resume_with_another_dictionary(refused, reordered, deq_training, deq_checkpoint):
    before = deq_checkpoint.read_bytes()
    options = (*deq_training[1:], "--save-dir", deq_checkpoint.parent, "--max-update", "5")
    assert "another order" in refused("fairseq-train", reordered, *options).text
    assert deq_checkpoint.read_bytes() == before


def test_counts_do_not_matter(in_process, recounted, tiny_checkpoint, evaluation):
    in_process("fairseq-eval-lm", recounted, "--path", tiny_checkpoint, *evaluation)


def test_a_checkpoint_without_a_hash_is_taken_as_it_is(
    in_process, data_bin, tiny_checkpoint, evaluation, tmp_path
):
    state = torch.load(tiny_checkpoint, weights_only=False)
    state["task_state"] = {}
    torch.save(state, tmp_path / "older.pt")
    in_process("fairseq-eval-lm", data_bin, "--path", tmp_path / "older.pt", *evaluation)
