"""Messages of fairseq and its libraries that do not help a user."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Beginnings of warnings about how fairseq calls torch and hydra, which no option of the user changes.
KNOWN_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",
    "`torch.cuda.amp.GradScaler(args...)` is deprecated",
    "`torch.cuda.amp.autocast(args...)` is deprecated",
    "`torch.jit.script` is deprecated",
    "torch.cuda.amp.GradScaler is enabled, but CUDA is not available",
    "CUDA is not available or torch_xla is imported. Disabling autocast",
    "__array__ implementation doesn't accept a copy keyword",
    "overflow encountered in scalar subtract",
    "\nThe version_base parameter is not specified",
    "hydra.experimental.initialize() is no longer experimental",
    "hydra.experimental.compose() is no longer experimental",
    "In 'config': Usage of deprecated keyword in package header",
    "\n'config' is validated against ConfigStore schema with the same name",
    "\nThe strict flag in the compose API is deprecated",
    "Future Hydra versions will no longer change working directory",
    "torch.nn.utils.weight_norm is deprecated",
)
_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
_BY_BASIC_CONFIG = "%(levelname)s:%(name)s:%(message)s"
# Libraries that log details of their own work at INFO.
_TALKATIVE = ("matplotlib", "PIL")


def root_logger_is_at_debug() -> bool:
    """Whether importing fairseq has left the root logger at DEBUG, with a handler that nobody asked for."""
    root = logging.getLogger()
    return root.level == logging.DEBUG and any(_is_strays(handler) for handler in root.handlers)


def with_root_logger_put_right(module: Any) -> Any:
    """Set the root logger back to the level and the handlers with which Python starts.

    A module of fairseq calls `logging.basicConfig(level=logging.DEBUG)` when it is imported. After that the
    configuration of tools and programs has no effect.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if _is_strays(handler):
            root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    return module


def _is_strays(handler: logging.Handler) -> bool:
    """Whether this is the handler that `logging.basicConfig` makes."""
    is_stream = type(handler) is logging.StreamHandler
    return is_stream and handler.formatter is not None and handler.formatter._fmt == _BY_BASIC_CONFIG


def in_quiet(call: Callable[..., Any]) -> Callable[..., Any]:
    """Run a tool with its own log, and without the warnings of `KNOWN_WARNINGS`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with quiet():
            return call(*args, **kwargs)

    return wrapper


@contextmanager
def quiet() -> Iterator[None]:
    """Log at INFO (or `LOGLEVEL`), as fairseq's tools intend, and leave the known warnings out."""
    root = logging.getLogger()
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    if not root.handlers:
        logging.basicConfig(format=_FORMAT, datefmt="%Y-%m-%d %H:%M:%S", level=level)
    elif root.level == logging.WARNING:
        root.setLevel(level)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for beginning in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", re.escape(beginning))
        yield
