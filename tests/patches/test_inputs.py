"""Data and checkpoints that cannot be used are explained; those that can are used as before.

How the tools end on each of them is in tests/test_bad_input.py.
"""

import pickle

import pytest
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils

from fairseq_deq.errors import OptionError


def test_a_dictionary_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"there is no dictionary .*/words\.txt"):
        Dictionary.load(str(tmp_path / "words.txt"))


def test_a_dictionary_in_an_open_file_is_read(tmp_path):
    (tmp_path / "dict.txt").write_text("the 3\n")
    with open(tmp_path / "dict.txt") as file:
        assert "the" in Dictionary.load(file)


def test_a_text_that_is_not_there_is_none_to_those_who_look_for_one(tmp_path):
    assert data_utils.load_indexed_dataset(str(tmp_path / "valid1"), Dictionary()) is None


def test_an_empty_text_is_named(tmp_path):
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(OptionError, match=f"the text 'train.txt' in {tmp_path} is empty"):
        data_utils.load_indexed_dataset(str(tmp_path / "train.txt"), Dictionary(), dataset_impl="raw")


def test_a_checkpoint_that_is_not_there_stays_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "none.pt"))


def test_the_cause_of_a_damage_is_kept(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"\x80\x02}.")
    with pytest.raises(OptionError, match="is not a whole fairseq checkpoint") as found:
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))
    assert isinstance(found.value.__cause__, (pickle.UnpicklingError, KeyError, RuntimeError, EOFError))
