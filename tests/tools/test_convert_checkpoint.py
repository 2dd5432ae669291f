"""A checkpoint that holds more than data is converted by an explicit command, and by nothing else."""

import argparse
import os

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fairseq_deq.checkpoint_file import read_checkpoint
from fairseq_deq.tools.convert_checkpoint import main


class Makes:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.makedirs, (str(self.place),)


@pytest.fixture
def old(deq_checkpoint, tmp_path):
    """A checkpoint as an older fairseq saved it."""
    state = torch.load(deq_checkpoint, weights_only=False)
    state["extra_state"]["best"] = np.float64(2.5)
    state["extra_state"]["history"] = np.arange(3)
    state["cfg"]["bpe"] = {"_name": "gpt2", "gpt2_encoder_json": "https://host/encoder.json"}
    state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    state["extra_state"]["named"] = argparse.Namespace(a=np.int64(1))
    torch.save(state, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def test_it_says_what_the_file_calls_and_loads_nothing(old, tmp_path, capsys):
    state = torch.load(old, weights_only=False)
    state["extra_state"]["made"] = Makes(tmp_path / "canary")
    torch.save(state, old)
    assert main([str(old), str(tmp_path / "new.pt")]) == 1
    said, sentence = capsys.readouterr()
    assert "--i-trust-its-author" in sentence
    assert "omegaconf.dictconfig.DictConfig" in said
    assert "os.makedirs" in said
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "new.pt").exists()


def test_what_it_writes_is_data_and_evaluates_as_before(
    old, deq_checkpoint, in_process, data_bin, evaluation, tmp_path, capsys
):
    main([str(old), str(tmp_path / "new.pt"), "--i-trust-its-author"])
    assert "left out: the options of bpe" in capsys.readouterr().out
    state = read_checkpoint(tmp_path / "new.pt")
    assert state["extra_state"]["best"] == 2.5
    assert torch.equal(state["extra_state"]["history"], torch.arange(3))
    assert state["extra_state"]["named"] == argparse.Namespace(a=1)
    printed = [
        in_process("fairseq-eval-lm", data_bin, "--path", path, *evaluation).text.rpartition("Loss")[2]
        for path in (deq_checkpoint, tmp_path / "new.pt")
    ]
    assert printed[0] == printed[1]


def test_it_overwrites_nothing(old, tmp_path, capsys):
    (tmp_path / "new.pt").write_bytes(b"here")
    assert main([str(old), str(tmp_path / "new.pt"), "--i-trust-its-author"]) == 1
    assert "new.pt already exists" in capsys.readouterr().err
    assert (tmp_path / "new.pt").read_bytes() == b"here"
    assert main([str(tmp_path / "none.pt"), str(tmp_path / "other.pt")]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
