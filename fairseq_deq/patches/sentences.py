"""Lets fairseq's tools end in one sentence, with a status that is not 0, when something cannot work."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from ..errors import OptionError, RunError
from ..options import flag

# How errors of this package are named in a traceback that another process sent as text.
_NAMES = tuple(f"{error.__module__}.{error.__qualname__}: " for error in (OptionError, RunError))
_AN_OPTION = re.compile(r"(^|[\s(`'\"])--[a-z][a-z-]+")
_LOST_PEER = re.compile(
    "onnection closed by peer|onnection reset by peer|Broken pipe|ocket Timeout|timed out|Timed out"
)


@contextlib.contextmanager
def one_sentence(cfg: Any = None) -> Iterator[None]:
    """Turn an error that can be explained into `error: ...` on standard error, and status 1.

    Args:
        cfg: fairseq's configuration, from which the explanation takes names of options.
    Raises:
        SystemExit: the error can be explained; any other error is raised unchanged.
    """
    try:
        yield
    except Exception as error:
        sentence = explain(error, cfg)
        if sentence is None:
            raise
        raise SystemExit(f"error: {sentence}") from None


def explain(error: BaseException, cfg: Any = None) -> str | None:
    """The sentence for an error that a user can do something about; None for any other error.

    Args:
        error: what was raised.
        cfg: fairseq's configuration.
    """
    text = str(error).strip()
    if isinstance(error, (OptionError, RunError)):
        return _one_line(text)
    if isinstance(error, ProcessRaisedException):
        # It holds the traceback of the process as text.
        for name in _NAMES:
            if name in text:
                return text.rpartition(name)[2].strip()
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return _about_a_file(error, cfg)
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory ({_one_line(text)[:150]}): make --batch-size, --max-tokens, "
            "--tokens-per-sample or "
            "the model smaller"
        )
    if isinstance(error, (RuntimeError, torch.distributed.DistError)) and _is_about_peers(error, text):
        return (
            "another process of this run has ended, and this one cannot go on alone; its own message "
            "says why, "
            "and the same command goes on from the last checkpoint"
        )
    if isinstance(error, ImportError) and "nstall" in text:
        return _one_line(text)
    if type(error).__module__.startswith("omegaconf."):
        first = _one_line(text.splitlines()[0])
        return f"{flag(str(key))}: {first}" if (key := getattr(error, "key", None)) else first
    # fairseq's own messages, if they name an option
    kinds = (AssertionError, ValueError, NotImplementedError, RuntimeError)
    if (isinstance(error, kinds) or type(error) is Exception) and _AN_OPTION.search(text) and len(text) < 500:
        return _one_line(text)
    return None


def _about_a_file(error: OSError, cfg: Any) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = getattr(getattr(cfg, "checkpoint", None), "save_dir", None)
        where = error.filename or folder or "this folder"
        return f"no space left on the disk of {where}: free some, and run the same command again"
    if error.filename is None or error.errno not in (
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE),
    ):
        return None
    path = str(error.filename) if isinstance(error.filename, int) else os.fsdecode(error.filename)
    reason = error.strerror or "cannot be used"
    return f"{_option_of(path, cfg)}{path}: {reason[:1].lower()}{reason[1:]}"


def _option_of(path: str, cfg: Any) -> str:
    """The option that names the file, followed by a space; empty if no option does."""
    from omegaconf import OmegaConf

    if isinstance(cfg, Namespace):  # fairseq-generate passes argparse's Namespace
        cfg = OmegaConf.create({"typed": {k: v for k, v in vars(cfg).items() if isinstance(v, str)}})
    for group in cfg if hasattr(cfg, "keys") else ():
        options = cfg.get(group)
        for name in options if hasattr(options, "keys") else ():
            value = None if OmegaConf.is_missing(options, name) else options.get(name)
            is_within = isinstance(value, str) and value and (path == value or path.startswith(f"{value}/"))
            if is_within and not name.startswith("_"):
                return "" if name == "data" else f"{flag(name)} "
    return ""


def _is_about_peers(error: BaseException, text: str) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return isinstance(error, torch.distributed.DistError)
    return bool(_LOST_PEER.search(text)) or isinstance(error, torch.distributed.DistError)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------- replacements


def ending_in_one_sentence(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of a tool so that its errors are explained as in `one_sentence`.

    If the function has an argument `cfg`, it is the first one.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with one_sentence(args[0] if args else kwargs.get("cfg")):
            return function(*args, **kwargs)

    return wrapper


def with_failed_jobs_explained(return_value: Any) -> Any:
    """Replace the property from which hydra reads a job's result, so that known errors end in a sentence.

    A package that `common.user_dir` names is imported within the job, after the functions that a tool calls
    first. hydra reads the job's result later still.
    """
    if not isinstance(return_value, property) or hasattr(return_value.fget, "__wrapped__"):
        return return_value
    get = return_value.fget

    def getter(self: Any) -> Any:
        error = self._return_value
        if isinstance(error, Exception):
            with one_sentence():
                raise error
        assert get is not None
        return get(self)

    getter.__wrapped__ = get  # type: ignore[attr-defined]
    return property(getter, return_value.fset)
