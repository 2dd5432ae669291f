"""Faults of fairseq in training with several processes, mostly without GPUs."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError
from .processes import run_processes

logger = logging.getLogger(__name__)

_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def with_processes_as_asked(call_main: Callable[..., None]) -> Callable[..., None]:
    """Start and count the processes of a run that the command line or torchrun asks for.

    torchrun without `--distributed-world-size` would train independent copies that overwrite each other's
    checkpoints; without GPUs, `--distributed-world-size 2` alone would end in an AssertionError, and
    `--distributed-init-method` without `--distributed-no-spawn` would start no process, train nothing and end
    with status 0; the default backend, nccl, works with GPUs only. Here torchrun's numbers count,
    `--distributed-world-size 2` alone starts 2 processes on the CPU, gloo replaces nccl there, and the third
    case is refused with a sentence. Processes that are started end together.
    """
    from fairseq.distributed import utils as distributed_utils

    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        distributed = cfg.distributed_training
        trains = cfg.common_eval.path is None  # the tools that evaluate need --path
        if trains and distributed.distributed_world_size == 1 and _launched_processes() > 1:
            distributed.distributed_world_size = _launched_processes()
            logger.info("torchrun started %d processes: training on all of them", _launched_processes())
        if distributed.distributed_world_size == 1 or cfg.common.tpu:
            call_main(cfg, main, **kwargs)
            return
        on_cpu = cfg.common.cpu or torch.cuda.device_count() == 0
        if on_cpu and distributed.distributed_backend == "nccl":
            distributed.distributed_backend = "gloo"
            logger.info("--distributed-backend gloo instead of nccl, which needs GPUs")
        if on_cpu and _must_spawn(distributed):
            _choose_port(distributed)
            run_processes(cfg, main, {**kwargs, "start_rank": 0}, distributed.distributed_world_size)
            return
        if distributed.distributed_init_method is None:
            distributed_utils.infer_init_method(distributed)
        if on_cpu or distributed.distributed_no_spawn or distributed.distributed_init_method is None:
            call_main(cfg, main, **kwargs)
            return
        kwargs["start_rank"] = distributed.distributed_rank
        count = min(torch.cuda.device_count(), distributed.distributed_world_size)
        run_processes(cfg, main, kwargs, count)

    return wrapper


def _launched_processes() -> int:
    if not all(name in os.environ for name in _LAUNCHER_VARIABLES):
        return 1
    return int(os.environ["WORLD_SIZE"])


def _must_spawn(distributed: Any) -> bool:
    if distributed.distributed_no_spawn:
        return False
    if distributed.distributed_init_method is not None:
        raise OptionError(
            "--distributed-init-method without --distributed-no-spawn starts one process for each GPU, and "
            "there is none; add --distributed-no-spawn --distributed-rank R and start one command for each "
            "rank, or leave --distributed-init-method out to start all processes on this machine"
        )
    launched_elsewhere = (
        _launched_processes() > 1 or "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ
    )
    return not launched_elsewhere


def _choose_port(distributed: Any) -> None:
    port = distributed.distributed_port
    if port <= 0:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
    distributed.distributed_port = port
    distributed.distributed_init_method = f"tcp://localhost:{port}"
    distributed.distributed_num_procs = distributed.distributed_world_size


def without_division_by_zero(infer: Callable[[Any], None]) -> Callable[[Any], None]:
    """Take torchrun's numbers without dividing by the number of GPUs where there is none."""

    def wrapper(cfg: Any) -> None:
        if torch.cuda.device_count() > 0:
            infer(cfg)
            return
        cfg.distributed_init_method = "env://"
        cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
        cfg.distributed_rank = int(os.environ["RANK"])
        cfg.device_id = 0
        cfg.distributed_no_spawn = True  # torchrun has started them

    return wrapper


def then_leaving_the_group(distributed_main: Callable[..., None]) -> Callable[..., None]:
    """Leave the process group at the end, so that a run of several processes has the status it deserves."""

    from fairseq.distributed.utils import get_global_group

    def wrapper(i: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
        distributed_main(i, main, cfg, kwargs)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # fairseq keeps the group, which another run in this process could not use
            vars(get_global_group).pop("_global_group", None)
            atexit.register(_collect_no_more)

    return wrapper


def _collect_no_more() -> None:
    """Leave what is still there to the end of the process.

    A collection at exit may come to torch's Reducer. Its destructor holds the lock of the interpreter, and
    waits for a thread of gloo that may be waiting for that lock: then a finished run never ends.
    """
    gc.disable()
    gc.freeze()


def without_devices_on_cpu(data_parallel: Callable[..., Any]) -> Callable[..., Any]:
    """Let the default `--ddp-backend pytorch_ddp` train on CPUs, where torch refuses `device_ids`."""

    def wrapper(module: torch.nn.Module, **options: Any) -> Any:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            options = {**options, "device_ids": None, "output_device": None}
        with warnings.catch_warnings():
            # torch deprecates an option that fairseq always passes; nobody can type anything against that
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return data_parallel(module=module, **options)

    return wrapper
