"""Checkpoints survive kills and full disks, and what cannot be written is said in one sentence."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_deq.errors import OptionError, RunError


def test_a_kill_during_a_copy_leaves_the_old_file_whole(monkeypatch, tmp_path):
    source, target = tmp_path / "checkpoint_1_4.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new" * 1000)
    target.write_bytes(b"old" * 1000)

    def killed_half_way(src, dst, **options):
        with open(dst, "wb") as file:
            file.write(b"new" * 500)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", killed_half_way)
    with pytest.raises(KeyboardInterrupt):
        PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"old" * 1000


def test_a_copy_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    source, target = tmp_path / "checkpoint_1_4.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1_4.pt", "checkpoint_last.pt"]


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(monkeypatch, tmp_path):
    target, steps = tmp_path / "checkpoint_last.pt", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append(target.exists()))
    checkpoint_utils.torch_persistent_save({"a": 1}, str(target))
    assert steps == [False, True]  # the file, then the folder that names it


def test_what_other_processes_left_is_removed_and_what_they_are_writing_stays(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target = tmp_path / "checkpoint_last.pt"
    for name in (f"{dead.pid}.tmp", f"{os.getppid()}.tmp", "tmp"):
        (tmp_path / f"checkpoint_last.pt.{name}").write_bytes(b"half")
    checkpoint_utils.torch_persistent_save({"a": 1}, str(target))
    assert torch.load(target) == {"a": 1}
    left = [f"checkpoint_last.pt{end}" for end in ("", f".{os.getppid()}.tmp")]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_start_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / "checkpoint_1_500.pt.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


class FullDisk:
    """A file of which the disk takes the first bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(bytes(data)[:64])
        raise OSError(28, os.strerror(28))


def test_a_full_disk_costs_no_checkpoint(monkeypatch, tmp_path):
    target = tmp_path / "checkpoint_last.pt"
    checkpoint_utils.torch_persistent_save({"a": 1}, str(target))
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda obj, file: save(obj, FullDisk(file)))
    with pytest.raises(RunError, match=r"no space left: \d+ MiB are free"):
        checkpoint_utils.torch_persistent_save({"a": 2}, str(target))
    assert torch.load(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_last.pt"]


def test_a_save_dir_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OptionError, match=r"--save-dir .*/file/save cannot be written to \(Not a directory\)"
    ):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "file" / "save"))


def test_a_save_dir_that_is_read_only_is_named(monkeypatch, tmp_path):
    def refuse(path, *arguments, **options):
        raise OSError(30, os.strerror(30), path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(OptionError, match=r"--save-dir .* cannot be written to \(Read-only file system\)"):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
