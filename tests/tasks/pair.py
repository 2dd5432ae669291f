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
        self.pipes, theirs = zip(*(context.Pipe() for _ in range(2)))
        self.process = context.Process(target=serve_both, args=theirs)
        self.process.start()

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
        for pipe in self.pipes:
            pipe.send(None)
        self.process.join(30)
        self.process.kill()


def serve_both(*pipes: Any) -> None:
    """What the first process runs: the second is a fork of it, after the imports that both need."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch._dynamo  # the first optimizer imports it
    from quick_hydra import make_hydra_quick

    from fairseq_deq.registration import register

    torch.set_num_threads(1)
    register()
    make_hydra_quick()
    second = get_context("fork").Process(target=serve, args=(1, pipes[1]), daemon=True)
    second.start()
    serve(0, pipes[0])
    second.join(30)


def serve(rank: int, pipe: Any) -> None:
    """Train what the pipe brings, until it brings None."""
    from conftest import run_in_process

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
