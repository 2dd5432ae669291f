"""Options that fairseq ignores or answers with a crash elsewhere."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..errors import OptionError
from ._patch import replace

logger = logging.getLogger(__name__)

_PACKAGE = __package__.split(".")[0]


def check_model_overrides() -> None:
    """Refuse unknown names in `--model-overrides` for the models of this package.

    The fault: a name that no part of the checkpoint's configuration has is ignored, so `--model-overrides
    '{"f_tresh": 60}'` evaluates with the old value. A name that the model has now but an older checkpoint
    has not is ignored too; it is given its place here.
    """
    from fairseq import checkpoint_utils

    replace(checkpoint_utils, "overwrite_args_by_name", _with_known_names)


def _with_known_names(overwrite: Callable[..., None]) -> Callable[..., None]:
    def wrapper(cfg: Any, overrides: Mapping[str, Any]) -> None:
        model = cfg.get("model") if hasattr(cfg, "get") else None
        name = str(getattr(model, "_name", "") or "")
        if name.startswith("deq_"):
            _check_overrides(cfg, model, name, overrides)
        overwrite(cfg, overrides)

    return wrapper


def _check_overrides(cfg: Any, model: Any, name: str, overrides: Mapping[str, Any]) -> None:
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from omegaconf import open_dict

    if "model_overrides" in overrides:  # fairseq-validate passes its whole command line beside them
        overrides = ast.literal_eval(overrides["model_overrides"])
    nested = overrides.get("model")
    names = {key for key in overrides if key != "model"} | (
        set(nested) if isinstance(nested, Mapping) else set()
    )
    dataclass = MODEL_DATACLASS_REGISTRY.get(name)
    fields = getattr(dataclass, "__dataclass_fields__", {})
    own = sorted(field for field in {*fields, *model} if not field.startswith("_"))
    unknown = sorted(names - set(own) - set(_all_keys(cfg)) - set(_options_of_choices(overrides)))
    if unknown:
        close = difflib.get_close_matches(unknown[0], own, n=1)
        raise OptionError(
            f"--model-overrides names {unknown[0]!r}, which {name} does not have"
            + (f" (did you mean {close[0]!r}?)" if close else "")
            + f"; its options are: {', '.join(own)}"
        )
    with open_dict(model):
        for key in names:
            if key in fields and key not in model:
                model[key] = None  # fairseq overwrites only what is there


def _options_of_choices(overrides: Mapping[str, Any]) -> Iterable[str]:
    """The options that a choice in `overrides` brings along, as `bpe="sentencepiece"` does its model."""
    from fairseq.registry import REGISTRIES

    for key, choice in overrides.items():
        dataclass = REGISTRIES.get(key, {}).get("dataclass_registry", {}).get(str(choice))
        yield from getattr(dataclass, "__dataclass_fields__", {})


def _all_keys(cfg: Any) -> Iterable[str]:
    for key in cfg:
        yield key
        # "???" stands for a value that must be given, and reading it raises
        value = cfg._get_node(key) if hasattr(cfg, "_get_node") else None
        if hasattr(value, "keys"):
            yield from _all_keys(value)
        elif hasattr(value, "__dict__"):
            yield from vars(value)


def check_syntax_of_model_overrides() -> None:
    """Refuse `--model-overrides` that is no dictionary in words.

    The fault: it is given to `eval`, so a forgotten quotation mark ends in a SyntaxError or NameError.
    """
    from fairseq.distributed import utils as distributed_utils

    replace(distributed_utils, "call_main", _with_overrides_checked)


def _with_overrides_checked(call_main: Callable[..., None]) -> Callable[..., None]:
    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        text = cfg.common_eval.model_overrides
        try:
            ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            raise OptionError(
                f"--model-overrides must be a dictionary such as \"{{'f_thres': 60}}\", got {text}"
            ) from None
        call_main(cfg, main, **kwargs)

    return wrapper


def accept_user_dir_of_imported_package() -> None:
    """Say what to type when `--user-dir` and an already imported copy of this package are at odds.

    The fault: once the package is imported (in a program that calls fairseq's tools), `--user-dir` with
    another copy of it ends in advice to rename the folder, and `--user-dir fairseq_deq` away from the
    checkout in a FileNotFoundError. The second means the imported copy, and is accepted.
    """
    from fairseq import utils

    replace(utils, "import_user_module", _with_imported_copy)


def _with_imported_copy(import_user_module: Callable[[Any], None]) -> Callable[[Any], None]:
    def wrapper(args: Any) -> None:
        user_dir = getattr(args, "user_dir", None)
        imported = sys.modules.get(_PACKAGE)
        path = os.path.abspath(user_dir) if user_dir is not None else ""
        if imported is None or os.path.basename(path) != _PACKAGE or path in imported.__path__:
            import_user_module(args)
            return
        home = imported.__path__[0]
        if os.path.exists(path) and os.path.realpath(path) != os.path.realpath(home):
            raise ImportError(
                f"--user-dir {user_dir} is a second copy of {_PACKAGE}, and {home} is already imported; "
                f"type --user-dir {home}, or leave --user-dir out"
            )
        logger.info("--user-dir %s: using %s, which is already imported", user_dir, home)

    return wrapper


def explain_precision_without_device() -> None:
    """Run `--bf16` without a TPU, and refuse `--fp16` on a CPU in words.

    The fault: the command line turns `--bf16` into "use a TPU", and without one (on a GPU as on a CPU) the
    trainer dies with an AttributeError about None (and Adam has become AdamW before that); `--fp16` on a CPU
    dies in an assertion about CUDA.
    """
    from fairseq.distributed import utils as distributed_utils

    replace(distributed_utils, "call_main", _with_precision_checked)


def _with_precision_checked(call_main: Callable[..., None]) -> Callable[..., None]:
    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        _check_precision(cfg)
        call_main(cfg, main, **kwargs)

    return wrapper


def _check_precision(cfg: Any) -> None:
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
