"""Faults of fairseq in training with several processes, mostly without GPUs."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError
from ._patch import replace

logger = logging.getLogger(__name__)

_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def start_processes_as_asked() -> None:
    """Start and count the processes of a run that the command line or torchrun asks for.

    The faults: torchrun without `--distributed-world-size` trains independent copies that overwrite each
    other's checkpoints; without GPUs, torchrun with it ends in a ZeroDivisionError,
    `--distributed-world-size 2` alone in an AssertionError, and `--distributed-init-method` without
    `--distributed-no-spawn` starts no process, trains nothing and ends with status 0; the default backend,
    nccl, works with GPUs only. Here torchrun's numbers count, `--distributed-world-size 2` alone starts 2
    processes on the CPU, gloo replaces nccl there, and the third case is refused with a sentence.
    """
    from fairseq.distributed import utils as distributed_utils

    replace(distributed_utils, "call_main", _with_processes_as_asked)
    replace(distributed_utils, "_infer_torch_distributed_launch_init", _without_division_by_zero)


def _with_processes_as_asked(call_main: Callable[..., None]) -> Callable[..., None]:
    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        distributed = cfg.distributed_training
        if (
            getattr(main, "__module__", "") == "fairseq_cli.eval_lm"
            and distributed.distributed_world_size > 1
        ):
            raise OptionError(
                "--distributed-world-size must be 1 for fairseq-eval-lm: with "
                f"{distributed.distributed_world_size}, each process would print the perplexity of its own "
                "part of the text"
            )
        trains = cfg.common_eval.path is None  # the tools that evaluate need --path
        if trains and distributed.distributed_world_size == 1 and _launched_processes() > 1:
            distributed.distributed_world_size = _launched_processes()
            logger.info("torchrun started %d processes: training on all of them", _launched_processes())
        on_cpu = cfg.common.cpu or torch.cuda.device_count() == 0
        if on_cpu and not cfg.common.tpu and distributed.distributed_world_size > 1:
            if distributed.distributed_backend == "nccl":
                distributed.distributed_backend = "gloo"
                logger.info("--distributed-backend gloo instead of nccl, which needs GPUs")
            if _must_spawn(distributed):
                _spawn_on_cpu(cfg, main, kwargs)
                return
        call_main(cfg, main, **kwargs)

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


def _spawn_on_cpu(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    distributed = cfg.distributed_training
    port = distributed.distributed_port
    if port <= 0:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
    distributed.distributed_port = port
    distributed.distributed_init_method = f"tcp://localhost:{port}"
    distributed.distributed_num_procs = distributed.distributed_world_size
    distributed.distributed_rank = None  # each process takes its own number
    torch.multiprocessing.spawn(
        fn=_run_process,
        args=(main, cfg, {**kwargs, "start_rank": 0}),
        nprocs=distributed.distributed_world_size,
        join=True,
    )


def _run_process(i: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
    # A function of this module, so that a new process has the patches before it runs anything of fairseq.
    from fairseq.distributed import utils as distributed_utils

    distributed_utils.distributed_main(i, main, cfg, kwargs)


def _without_division_by_zero(infer: Callable[[Any], None]) -> Callable[[Any], None]:
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


def leave_process_groups() -> None:
    """End a run of several processes with the status that it deserves.

    The fault: fairseq never leaves the process group, so that now and then a process aborts in the threads
    of gloo when it ends ("terminate called without an active exception"), and a finished run has status 1.
    """
    from fairseq.distributed import utils as distributed_utils

    replace(distributed_utils, "distributed_main", _then_leaving_the_group)


def _then_leaving_the_group(distributed_main: Callable[..., None]) -> Callable[..., None]:
    from fairseq.distributed.utils import get_global_group

    def wrapper(i: int, main: Callable[..., Any], cfg: Any, kwargs: dict[str, Any]) -> None:
        distributed_main(i, main, cfg, kwargs)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # fairseq keeps the group, which another run in this process could not use
            vars(get_global_group).pop("_global_group", None)

    return wrapper


def refuse_sharded_equilibria() -> None:
    """Refuse `--ddp-backend fully_sharded` for the models of this package.

    The reason: it frees the weights of a module after its forward pass and gathers them again when autograd
    reaches the module. The implicit gradient multiplies with the Jacobian of the layer many times within one
    node of the backward pass, and so with weights that are not there.
    """
    from fairseq.distributed import utils as distributed_utils

    replace(distributed_utils, "call_main", _without_sharded_equilibria)


def _without_sharded_equilibria(call_main: Callable[..., None]) -> Callable[..., None]:
    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        name = str(getattr(cfg.get("model"), "_name", "") or "")
        if name.startswith("deq_") and cfg.distributed_training.ddp_backend == "fully_sharded":
            raise OptionError(
                f"--ddp-backend fully_sharded does not work with --arch {name}: it frees the layer's "
                "weights after the forward pass, and the implicit gradient needs them in the backward pass; "
                "use pytorch_ddp or legacy_ddp (one layer's weights are all that a process keeps)"
            )
        call_main(cfg, main, **kwargs)

    return wrapper


def wrap_cpu_models_without_devices() -> None:
    """Let the default `--ddp-backend pytorch_ddp` train on CPUs.

    The fault: fairseq passes `device_ids` whatever the device, which torch refuses for a module on the CPU
    with a ValueError.
    """
    from fairseq.models import distributed_fairseq_model

    replace(distributed_fairseq_model, "DistributedDataParallel", _without_devices_on_cpu)


def _without_devices_on_cpu(data_parallel: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(module: torch.nn.Module, **options: Any) -> Any:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            options = {**options, "device_ids": None, "output_device": None}
        with warnings.catch_warnings():
            # torch deprecates an option that fairseq always passes; nobody can type anything against that
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return data_parallel(module=module, **options)

    return wrapper
