"""The processes of a run end together, and say why in one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PACKAGE

# Two processes are enough for what happens between them, and this many updates for hours.
ENDLESS = ("--distributed-world-size", "2", "--max-update", "1000000", "--disable-validation", "--no-save")


def processes_of(group):
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def children_that_train(launcher):
    """The processes that the launcher started to train, in the order of their ranks."""
    found = []
    for pid in sorted(processes_of(launcher)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except FileNotFoundError:
            continue
        if "spawn_main" in command:
            found.append(pid)
    return found


# fairseq-train, but the processes are forks of the launcher, which saves them their imports.
FORKING = """
import functools
import torch, torch._dynamo
from fairseq_cli.train import cli_main

torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
cli_main()
"""
SCRIPT = (str(Path(sys.executable).with_name("fairseq-train")),)


@pytest.fixture
def launcher(request, deq_training, tmp_path):
    """A run of two processes in the background, as a script starts it: SIGINT is ignored there."""
    log = tmp_path / "log"
    program = getattr(request, "param", SCRIPT)
    options = (*deq_training, *ENDLESS, "--log-interval", "1", "--user-dir", str(PACKAGE))
    with open(log, "w") as file:
        started = subprocess.Popen(
            [sys.executable, *program, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
    deadline = time.time() + 120
    while "train_inner" not in log.read_text():
        assert started.poll() is None, log.read_text()[-3000:]
        assert time.time() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    started.log = log  # type: ignore[attr-defined]
    yield started
    for pid in processes_of(started.pid):
        os.kill(pid, signal.SIGKILL)
    started.wait()


def ends(launcher):
    """The status of the launcher, after which nothing of the run is left."""
    status = launcher.wait(timeout=60)
    deadline = time.time() + 30
    while processes_of(launcher.pid):
        assert time.time() < deadline, "some of the processes train on"
        time.sleep(0.1)
    return status


def last_line(launcher):
    text = launcher.log.read_text()
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (("-c", FORKING), signal.SIGTERM),
        pytest.param(SCRIPT, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(SCRIPT, signal.SIGINT, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM, forks", "SIGTERM", "SIGINT"],
    indirect=["launcher"],
)
def test_a_signal_to_the_launcher_ends_every_process(launcher, number):
    os.kill(launcher.pid, number)
    assert ends(launcher) == 128 + number
    assert last_line(launcher) == f"error: {number.name}: the run stops, and its 2 processes with it"


@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing_running(launcher):
    os.kill(launcher.pid, signal.SIGKILL)
    assert ends(launcher) == -signal.SIGKILL


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(launcher):
    os.kill(children_that_train(launcher.pid)[-1], signal.SIGKILL)
    assert ends(launcher) == 1
    assert last_line(launcher).startswith("error: process 1 of 2 was ended by SIGKILL (out of memory, or ")
