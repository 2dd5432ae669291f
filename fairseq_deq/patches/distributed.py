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
    """Start and count the processes of a run as the command line or torchrun asks for.

    This corrects four faults of fairseq:
    - torchrun without `--distributed-world-size` trains independent copies, which overwrite each other's
      checkpoints. Here torchrun's numbers are used.
    - Without GPUs, `--distributed-world-size 2` alone ends in an AssertionError. Here it starts 2 processes.
    - Without GPUs, `--distributed-init-method` without `--distributed-no-spawn` starts no process, trains
      nothing and ends with status 0. Here it is refused with a sentence.
    - The default backend, nccl, works with GPUs only. Here gloo replaces it on the CPU.

    If one of the processes that were started here ends early, all of them end.
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
    """Where there is no GPU, take torchrun's numbers without dividing by the number of GPUs."""

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
    """Leave the process group at the end of a run.

    Otherwise a finished run sometimes aborts with status 1.
    """

    from fairseq.distributed.utils import get_global_group

    def wrapper(i: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
        distributed_main(i, main, cfg, kwargs)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # fairseq keeps the group, but a later run in this process could not use it
            vars(get_global_group).pop("_global_group", None)
            atexit.register(_collect_no_more)

    return wrapper


def _collect_no_more() -> None:
    """Switch off Python's garbage collector, so that it does not run while the process exits.

    It might then destroy torch's Reducer. The destructor holds the interpreter lock while it waits for a
    thread of gloo, and that thread may be waiting for the lock: a finished run would never end.
    """
    gc.disable()
    gc.freeze()


def without_devices_on_cpu(data_parallel: Callable[..., Any]) -> Callable[..., Any]:
    """Let the default `--ddp-backend pytorch_ddp` train on CPUs, where torch refuses `device_ids`."""

    def wrapper(module: torch.nn.Module, **options: Any) -> Any:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            options = {**options, "device_ids": None, "output_device": None}
        with warnings.catch_warnings():
            # torch deprecates an option that fairseq always passes; no option of the user changes that
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return data_parallel(module=module, **options)

    return wrapper
