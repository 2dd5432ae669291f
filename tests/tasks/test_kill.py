"""A kill while a checkpoint is being written costs that checkpoint at most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import PACKAGE

# Kills itself half way through the second checkpoint: while it is written, or while it gets its second name.
KILLED = """
import io, os, shutil, signal, sys
import torch

where, calls = sys.argv.pop(1), []

def half_written(save):
    def wrapper(state, file, *args, **kwargs):
        if not isinstance(state, dict) or "extra_state" not in state:
            return save(state, file, *args, **kwargs)
        buffer = io.BytesIO()
        save(state, buffer)
        calls.append("save")
        if where == "save" and calls.count("save") == 2:
            file.write(buffer.getvalue()[:1000])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(buffer.getvalue())
    return wrapper

def half_copied(copyfile):
    def wrapper(source, target, **options):
        calls.append("copy")
        if where == "copy" and calls.count("copy") == 2:
            with open(source, "rb") as whole, open(target, "wb") as part:
                part.write(whole.read(1000))
                part.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return copyfile(source, target, **options)
    return wrapper

torch.save, shutil.copyfile = half_written(torch.save), half_copied(shutil.copyfile)
from fairseq_cli.train import cli_main

cli_main()
"""


@pytest.mark.parametrize("where", [pytest.param("save", marks=pytest.mark.slow), "copy"])
def test_the_next_start_goes_on_from_the_checkpoint_before(where, in_process, deq_training, tmp_path):
    options = ("--task", "deq_language_modeling", "--mem-len", "16", "--save-dir", str(tmp_path))
    training = (*deq_training, *options, "--disable-validation", "--save-interval-updates", "1")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, *training, "--user-dir", str(PACKAGE)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    log = in_process("fairseq-train", *training).text
    assert f"Loaded checkpoint {tmp_path / 'checkpoint_last.pt'} (epoch 1 @ 1 updates)" in log
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 3
