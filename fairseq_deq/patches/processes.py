"""Starts the processes of a run on one machine: each registers this package first, and they end together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException

from ..errors import OptionError, RunError

# Seconds that a process has to end after SIGTERM, before SIGKILL.
_PATIENCE = 10
_PR_SET_PDEATHSIG = 1


class _Stopped(BaseException):
    """A signal has asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_processes(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any], count: int) -> None:
    """Run a tool in several processes, and wait for them.

    All of them end if a signal comes to this process, if this process dies, or if one of them dies.

    Args:
        cfg: fairseq's configuration; each process gets its own rank.
        main: the function that each process runs.
        kwargs: those of fairseq's `distributed_main`, including `start_rank`.
        count: number of processes.
    Raises:
        RunError: one of them was killed.
        SystemExit: a signal came; the status is 128 plus its number.
    """
    cfg.distributed_training.distributed_rank = None  # each process takes its own index as rank
    context = torch.multiprocessing.spawn(
        fn=_run_process, args=(os.getpid(), main, cfg, kwargs), nprocs=count, join=False
    )
    try:
        with _signals_that_stop():
            while not context.join():
                pass
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        print(f"error: {name}: the run stops, and its {count} processes with it", file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None
    except ProcessExitedException as error:
        how = (
            f"was ended by {error.signal_name}"
            if error.signal_name
            else f"ended with status {error.exit_code}"
        )
        raise RunError(
            f"process {error.error_index} of {count} {how} (out of memory, or killed from outside), and the "
            "others were stopped; the same command goes on from the last checkpoint"
        ) from None
    finally:
        _end(context.processes)


@contextlib.contextmanager
def _signals_that_stop() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    # SIGINT too: a shell starts a background command with SIGINT ignored, but here it must stop the run.
    before = {
        number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: Any) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _run_process(i: int, launcher: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
    # A function of this package, so that a new process registers it before it runs any code of fairseq.
    _die_with(launcher)
    from ..registration import register

    register()
    from fairseq.distributed import utils as distributed_utils

    from .sentences import explain

    try:
        distributed_utils.distributed_main(i, main, cfg, kwargs)
    except Exception as error:
        sentence = explain(error, cfg)
        if sentence is None:
            raise
        raise OptionError(sentence) from None


def _die_with(launcher: int) -> None:
    """Let the kernel end this process when the launcher is gone, even by SIGKILL."""
    if sys.platform == "linux":
        # torch asks for SIGINT, which is ignored in a command that a shell starts in the background
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != launcher:
        raise SystemExit(1)
