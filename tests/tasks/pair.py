"""Two processes that run fairseq-train together, again and again: a start costs more than a training."""

from __future__ import annotations

import os
import socket
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch


class Pair:
    """Runs a training on two processes of this machine."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def train(self, *arguments: str | Path, dtype: str = "float32") -> str:
        """Run fairseq-train; what rank 0 printed and logged."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        for rank, pipe in enumerate(self.pipes):
            started = (
                *("--distributed-world-size", "2", "--distributed-rank", str(rank), "--distributed-no-spawn"),
                *("--distributed-init-method", f"tcp://localhost:{port}"),
            )
            pipe.send(([*map(str, arguments), *started], dtype))
        answers = [pipe.recv() for pipe in self.pipes]
        for succeeded, text in answers:
            assert succeeded, text
        return answers[0][1]

    def stop(self) -> None:
        """End both processes."""
        for pipe, process in zip(self.pipes, self.processes):
            pipe.send(None)
            process.join(30)
            process.kill()


def serve(rank: int, pipe: Any) -> None:
    """What each process runs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from conftest import run_in_process

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        arguments, dtype = task
        try:
            pipe.send((True, train_alone(run_in_process, *arguments, dtype=dtype)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))


def train_alone(run_in_process: Any, *arguments: str | Path, dtype: str = "float32") -> str:
    """Run fairseq-train in this process, with weights of `dtype`; what it printed and logged.

    In float64 gradients are compared: the probes of the Jacobian penalty are then made from f(z), so that a
    row has the same ones whatever process it is in.
    """
    import torch
    from fairseq import utils

    def norm_alone(parameters: Any, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(list(parameters), float("inf"))

    def probes(fz: torch.Tensor) -> torch.Tensor:
        return torch.cos(37 * fz.detach())

    torch.set_default_dtype(getattr(torch, dtype))
    try:
        if dtype == "float32":
            return run_in_process("fairseq-train", *arguments).text
        with (
            patch.object(utils, "clip_grad_norm_", norm_alone),  # fairseq's own is for float32 alone
            patch.object(torch, "randn_like", probes),
        ):
            return run_in_process("fairseq-train", *arguments).text
    finally:
        torch.set_default_dtype(torch.float32)
