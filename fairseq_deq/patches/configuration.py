"""Refuses options that cannot work together or would be ignored, before a tool begins."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError
from ..options import flag, ignored
from .generation_options import check_evaluation, check_generation
from .ranges import check_ranges

logger = logging.getLogger(__name__)

# What each criterion logs at every validation, and what deq_lm_loss adds for models of this package.
_LOGGED = {
    "deq_lm_loss": ("loss", "nll_loss", "ppl"),
    "cross_entropy": ("loss", "ppl"),
    "adaptive_loss": ("loss", "ppl"),
    "label_smoothed_cross_entropy": ("loss", "nll_loss", "ppl"),
}
_OF_SOLVES = ("f_nfe", "f_lane_nfe", "f_res", "f_conv")
# Options of this package's models that other criteria do not use.
_FOR_OUR_LOSS = ("jac_loss_weight", "jac_incremental", "spectral_radius")


def with_options_checked(call_main: Callable[..., None]) -> Callable[..., None]:
    """Check the options of a tool before it begins."""

    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        check(cfg, (getattr(main, "__module__", None) or "").rpartition(".")[2])
        call_main(cfg, main, **kwargs)

    return wrapper


def main_with_options_checked(main: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for a tool that calls its `main` without `call_main`."""

    def wrapper(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(cfg, "common_eval"):  # fairseq-generate passes argparse's Namespace
            from fairseq.dataclass.utils import convert_namespace_to_omegaconf

            cfg = convert_namespace_to_omegaconf(cfg)
        check(cfg, "generate")
        return main(cfg, *args, **kwargs)

    return wrapper


def defaults_with_options_checked(add_defaults: Callable[..., None]) -> Callable[..., None]:
    """The same, for a training that hydra started before this package was imported."""

    def wrapper(cfg: Any) -> None:
        add_defaults(cfg)
        check(cfg, "train")

    return wrapper


def check(cfg: Any, tool: str) -> None:
    """Check the options of a tool.

    Args:
        cfg: fairseq's configuration; `--bf16` without a TPU is corrected in it.
        tool: the module of fairseq_cli whose `main` is to run, such as `train`.
    Raises:
        OptionError: an option cannot work, or would be ignored.
    """
    _check_names(cfg)
    settle_precision(cfg)
    check_ranges(cfg)
    _check_overrides(cfg)
    _check_paths(cfg, tool)
    _check_batches(cfg, tool)
    if tool == "train":
        _check_model(cfg)
        _check_training(cfg)
        _check_metric(cfg)
    if tool == "eval_lm":
        check_evaluation(cfg)
    if tool in ("generate", "interactive"):
        check_generation(cfg, tool)


def _check_names(cfg: Any) -> None:
    """Refuse a task, model, criterion and so on that does not exist.

    argparse checks the command line, but not the names in a yaml file or a checkpoint.
    """
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_REGISTRY

    known = {"task": TASK_REGISTRY, "model": {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}}
    known |= {group: registry["registry"] for group, registry in REGISTRIES.items()}
    for group, names in known.items():
        options = cfg.get(group)
        name = options if isinstance(options, str) else getattr(options, "_name", None)
        if name is not None and name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise OptionError(
                f"{flag(group)} {name} does not exist{hint}; there are: {', '.join(sorted(names))}"
            )


def settle_precision(cfg: Any) -> None:
    """Let `--bf16` run without a TPU, and refuse `--fp16` on a CPU.

    fairseq turns `--bf16` on the command line into "use a TPU", and without a TPU its trainer would fail.

    Raises:
        OptionError: the device cannot do this.
    """
    common = cfg.common
    on_cpu = common.cpu or not torch.cuda.is_available()
    if common.tpu and importlib.util.find_spec("torch_xla") is None:
        if not common.bf16:
            raise OptionError("--tpu needs the package torch_xla, which is not installed; leave --tpu out")
        common.tpu = False
        for group in ("distributed_training", "task", "model", "optimizer"):  # each has a copy of the option
            if getattr(cfg.get(group), "tpu", False):
                cfg[group].tpu = False
    if common.fp16 and on_cpu:
        raise OptionError("--fp16 needs a GPU; on a CPU leave it out, or train with --bf16")


def _check_overrides(cfg: Any) -> None:
    for name, text in (
        ("model_overrides", cfg.common_eval.model_overrides),
        ("optimizer_overrides", cfg.checkpoint.optimizer_overrides),
    ):
        try:
            value = ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise OptionError(f"{flag(name)} must be a dictionary such as \"{{'f_thres': 120}}\", got {text}")


def _check_paths(cfg: Any, tool: str) -> None:
    path = cfg.common_eval.path
    if tool in ("eval_lm", "validate", "generate", "interactive", "score") and not path:
        raise OptionError("--path must name a checkpoint")
    if tool == "validate" and path and os.pathsep in path and not os.path.exists(path):
        raise OptionError(
            f"--path {path}: fairseq-validate takes one checkpoint; fairseq-eval-lm takes "
            "several, as an ensemble"
        )
    if cfg.dataset.shard_id >= cfg.dataset.num_shards:
        raise OptionError(
            f"--shard-id {cfg.dataset.shard_id} must be below --num-shards {cfg.dataset.num_shards}"
        )


def _check_batches(cfg: Any, tool: str) -> None:
    needed = tool in ("train", "validate")
    if needed and cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise OptionError("give the size of a batch with --batch-size, or with --max-tokens")
    block = getattr(cfg.get("task"), "tokens_per_sample", None)
    most = cfg.dataset.max_tokens
    is_cut = str(getattr(cfg.get("task"), "sample_break_mode", None)) == "none"
    if block and is_cut and most is not None and most < block:
        raise OptionError(f"--max-tokens {most} is less than --tokens-per-sample {block}: no block would fit")


def _check_model(cfg: Any) -> None:
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    model = cfg.get("model")
    name = str(getattr(model, "_name", "") or "")
    if not name.startswith("deq_"):
        return
    if cfg.distributed_training.ddp_backend == "slowmo":
        raise OptionError("--ddp-backend must be pytorch_ddp or legacy_ddp, got slowmo")
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        raise OptionError(
            f"--ddp-backend fully_sharded does not work with --arch {name}: it frees the layer's "
            "weights after the "
            "forward pass, and the implicit gradient needs them in the backward pass; use pytorch_ddp or "
            "legacy_ddp (one layer's weights are all that a process keeps)"
        )
    criterion, task = (str(getattr(cfg.get(group), "_name", None) or cfg.get(group)) for group in _TWO)
    for option in _FOR_OUR_LOSS if criterion != "deq_lm_loss" else ():
        if getattr(model, option, 0):
            raise OptionError(
                f"{flag(option)} {getattr(model, option)} needs --criterion deq_lm_loss, and --criterion "
                f"is {criterion}; leave it out, or change the criterion"
            )
    if getattr(model, "mem_len", 0) and task != "deq_language_modeling":
        raise OptionError(
            f"--mem-len {model.mem_len} needs --task deq_language_modeling, and --task is "
            f"{task}, whose "
            "batches do not continue each other; give --mem-len 0, or change the task"
        )
    dataclass = MODEL_DATACLASS_REGISTRY.get(name)
    for option, needed in ignored(model, type(dataclass) if not isinstance(dataclass, type) else dataclass):
        sentence = f"{flag(option)} {getattr(model, option)} needs {needed}"
        if not option.startswith(("b_", "pretrain_")):
            raise OptionError(f"{sentence}; leave it out")
        # only a warning, so that one can try another --gradient or --pretrain-steps without removing these
        logger.warning("%s: it has no effect", sentence)


_TWO = ("criterion", "task")


def _check_training(cfg: Any) -> None:
    if cfg.checkpoint.write_checkpoints_asynchronously and importlib.util.find_spec("iopath") is None:
        raise OptionError(
            "--write-checkpoints-asynchronously needs the package iopath, which is not installed; type: pip "
            "install iopath"
        )
    schedule = cfg.get("lr_scheduler")
    if getattr(schedule, "_name", None) == "inverse_sqrt" and schedule.warmup_updates < 1:
        raise OptionError(
            "--warmup-updates must be at least 1 with --lr-scheduler inverse_sqrt, got "
            f"{schedule.warmup_updates}"
        )


def _check_metric(cfg: Any) -> None:
    """Refuse a `--best-checkpoint-metric` that no validation will log."""
    metric = cfg.checkpoint.best_checkpoint_metric
    criterion = str(getattr(cfg.get("criterion"), "_name", None) or cfg.get("criterion"))
    if criterion not in _LOGGED or cfg.dataset.disable_validation:
        return
    model = cfg.get("model")
    logged = list(_LOGGED[criterion])
    if criterion != "deq_lm_loss" and cfg.optimization.sentence_avg:
        logged.append("nll_loss")
    task = str(getattr(cfg.get("task"), "_name", ""))
    if task == "copy_memory":
        logged.append("copy_loss")
    if task == "word_problem" and criterion == "deq_lm_loss":
        logged += ["accuracy", "last_accuracy"]
    if criterion == "deq_lm_loss" and str(getattr(model, "_name", "")).startswith("deq_"):
        if not model.pretrain_steps and str(model.gradient) != "unroll":
            logged += _OF_SOLVES
        if model.spectral_radius and not model.pretrain_steps:
            logged.append("sradius")
    if metric not in logged:
        raise OptionError(
            f"--best-checkpoint-metric {metric} is not logged at every validation of this run; it may "
            "be one of "
            f"{', '.join(logged)}"
        )
