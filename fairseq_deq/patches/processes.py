"""The processes that a run starts on one machine: they begin registered, and end together."""

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
    """A signal asks the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_processes(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any], count: int) -> None:
    """Run a tool in several processes, and wait for them.

    A signal to this process, its death, and the death of one of them end them all.

    Args:
        cfg: fairseq's configuration; each process takes a rank of its own.
        main: what a process runs.
        kwargs: for fairseq's `distributed_main`, `start_rank` among them.
        count: number of processes.
    Raises:
        RunError: one of them was killed.
        SystemExit: a signal came; the status is 128 plus its number.
    """
    cfg.distributed_training.distributed_rank = None  # each process takes its own number
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
        how = f"was ended by {error.signal_name}" if error.signal_name else f"left with {error.exit_code}"
        raise RunError(
            f"process {error.error_index} of {count} {how} (out of memory, or killed from outside), and the "
            "others were stopped; the same command goes on from the last checkpoint"
        ) from None
    finally:
        _end(context.processes)


@contextlib.contextmanager
def _signals_that_stop() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    # A shell starts a background command with SIGINT ignored, and a signal meant for this run must count.
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
    # A function of this module, so that a new process is registered before it runs anything of fairseq.
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
    """Have the kernel end this process when the launcher is gone, even by SIGKILL."""
    if sys.platform == "linux":
        # torch asks for SIGINT, which is ignored in whatever a shell starts in the background
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != launcher:
        raise SystemExit(1)
