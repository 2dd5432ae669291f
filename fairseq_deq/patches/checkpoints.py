"""Faults of fairseq in saving and loading checkpoints."""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import logging
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from ..checkpoint_file import read_checkpoint
from ..errors import OptionError
from ..options import flag

logger = logging.getLogger(__name__)

# Whether the checkpoint that is being loaded must be one of a language model.
_wants_language_models: ContextVar[bool] = ContextVar("fairseq_deq_wants_language_models", default=False)


def reading_data(whole: types.ModuleType) -> types.ModuleType:
    """torch for fairseq's `checkpoint_utils`: its `load` reads checkpoints as data, and runs no code."""
    return _TorchThatReadsData(whole)


class _TorchThatReadsData(types.ModuleType):
    """torch with another `load`, which reads checkpoints as data."""

    def __init__(self, whole: types.ModuleType) -> None:
        super().__init__("torch")
        self._whole = whole

    def load(self, file: Any, map_location: Any = "cpu", **_ignored: Any) -> Any:
        state = read_checkpoint(file, map_location)
        if _wants_language_models.get():
            _leave_tokenizers_out(state)
        return state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _leave_tokenizers_out(state: dict[str, Any]) -> None:
    """Drop a checkpoint's tokeniser and BPE, so that whoever loads it must name them.

    Their options name files, so a stranger's checkpoint could have any file of this machine read.
    """
    for name in ("tokenizer", "bpe"):
        own = (state.get("cfg") or {}).get(name)
        if own is not None:
            logger.info("the checkpoint's own %s is not used; name one where you load the checkpoint", name)
            state["cfg"][name] = None


def with_overrides_checked(load: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse overrides that are no dictionary of named options, and models of a kind that is not wanted."""

    def wrapper(
        path: str, arg_overrides: Mapping[str, Any] | None = None, load_on_all_ranks: bool = False
    ) -> Any:
        is_named = isinstance(arg_overrides, Mapping) and all(isinstance(key, str) for key in arg_overrides)
        if arg_overrides is not None and not is_named:
            raise OptionError(
                f"--model-overrides must name options, such as \"{{'f_thres': 120}}\", got {arg_overrides}"
            )
        state = load(path, arg_overrides, load_on_all_ranks)
        if _wants_language_models.get():
            _refuse_other_models(path, state)
        return state

    return wrapper


def with_settings_of_the_file(load: Callable[..., Any]) -> Callable[..., Any]:
    """Say in one sentence why a model cannot be built from a checkpoint.

    If the task is language modeling, also refuse other models, and begin texts as in training: see
    `_take_over_bos`.
    """
    signature = inspect.signature(load)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from fairseq.tasks.language_modeling import LanguageModelingTask
        from omegaconf.errors import ValidationError

        given = signature.bind(*args, **kwargs).arguments.get("task")
        is_one = isinstance(given, LanguageModelingTask)
        token = _wants_language_models.set(is_one or _wants_language_models.get())
        try:
            models, cfg, task = load(*args, **kwargs)
        except (OptionError, OSError, RuntimeError):
            raise
        except Exception as error:  # options of a file can be wrong in any way
            names = ", ".join(signature.bind(*args, **kwargs).arguments["filenames"])
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            if isinstance(error, ValidationError):  # of one option, which it names
                raise OptionError(f"{flag(str(error.key))}: {reason}; see --model-overrides") from None
            raise OptionError(
                f"the model of {names} cannot be built from its options ({type(error).__name__}: {reason}); "
                "was it trained with this version of fairseq, and does --model-overrides keep its sizes?"
            ) from error
        finally:
            _wants_language_models.reset(token)
        if is_one:
            _take_over_bos(task, cfg, models)
        return models, cfg, task

    return wrapper


@contextlib.contextmanager
def wanting_language_models() -> Iterator[None]:
    """In this context, refuse checkpoints of other models, whichever task they name."""
    token = _wants_language_models.set(True)
    try:
        yield
    finally:
        _wants_language_models.reset(token)


def _refuse_other_models(path: str, state: Mapping[str, Any]) -> None:
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, FairseqLanguageModel

    model = getattr(state.get("cfg"), "model", None)
    name = getattr(model, "_name", None) or getattr(model or state.get("args"), "arch", None)
    built = MODEL_REGISTRY.get(name) or ARCH_MODEL_REGISTRY.get(name)
    if built is not None and not issubclass(built, FairseqLanguageModel):
        raise OptionError(
            f"{path} is a checkpoint of {name}, which is no language model; give one that fairseq-train "
            "saved with a task of language modeling"
        )
    if built is None:
        raise OptionError(
            f"{path} is a checkpoint of a model {name!r} that is not there; give the --user-dir that it was "
            "trained with"
        )


def _take_over_bos(task: Any, cfg: Any, models: Iterable[Any]) -> None:
    """Begin texts with the token with which they began in training (`--add-bos-token`)."""
    from ..tasks.deq_language_modeling import DEQLanguageModelingTask

    trained = bool(getattr(getattr(cfg, "task", None), "add_bos_token", False))
    if trained and isinstance(task, DEQLanguageModelingTask):
        raise OptionError(
            "the checkpoint was trained with --add-bos-token, which --task deq_language_modeling does not "
            "have; use --task language_modeling"
        )
    if bool(getattr(task.args, "add_bos_token", False)) != trained:
        logger.info("--add-bos-token %s, as in the training of the checkpoint", str(trained).lower())
        task.args.add_bos_token = trained
    for model in models:
        model.begins_with_bos = trained


def with_bos_of_training(eval_lm: Callable[..., Any]) -> Callable[..., Any]:
    """Do not count the first token, `<s>`, in a perplexity if the training used `--add-bos-token`."""
    signature = inspect.signature(eval_lm)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        trained = getattr(call.arguments["models"][0], "begins_with_bos", None)
        if trained is not None:
            call.arguments["remove_bos_token"] = trained
        if trained:
            call.arguments["batch_iterator"] = map(_without_beginnings, call.arguments["batch_iterator"])
        return eval_lm(*call.args, **call.kwargs)

    return wrapper


def _without_beginnings(sample: dict[str, Any]) -> dict[str, Any]:
    """The same batch, with only the scored tokens counted: all but the first of each row."""
    if "net_input" not in sample:
        return sample
    return {**sample, "ntokens": sample["ntokens"] - sample["target"].shape[0]}


def with_plain_numbers(save: Callable[..., None]) -> Callable[..., None]:
    """Save numpy's numbers as Python's, because torch does not load numpy's as data."""

    def wrapper(obj: Any, *args: Any, **kwargs: Any) -> None:
        save(_plain(obj), *args, **kwargs)

    return wrapper


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    # Only plain dicts, lists and tuples are copied: other containers keep their type and identity.
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _with_safe_globals(load: Callable[..., Any]) -> Callable[..., Any]:
    """Let a process load what another process of the same run has sent.

    Such data is trusted, because it comes from the memory of that process and not from a file.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.serialization.safe_globals(_safe_globals()):
            return load(*args, **kwargs)

    return wrapper


def _safe_globals() -> list[Any]:
    from fairseq.distributed import utils as distributed_utils
    from omegaconf import DictConfig, ListConfig, base, nodes

    nodes_of_config = [value for value in vars(nodes).values() if isinstance(value, type)]
    return [
        argparse.Namespace,
        collections.defaultdict,
        distributed_utils._TensorPlaceholder,  # stands for each tensor in what rank 0 sends
        DictConfig,
        ListConfig,
        base.ContainerMetadata,
        base.Metadata,
        *nodes_of_config,
        (typing.Any, "typing.Any"),
        *(bool, dict, float, int, list, set, str, tuple),
    ]
