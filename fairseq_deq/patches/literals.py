"""fairseq evaluates strings of a configuration as Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..literals import literal


def reading_literals(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function before which every module of fairseq is given an `eval` that reads literals.

    Modules that are imported later are reached before a checkpoint is read, and before a model is built.
    """
    _shadow_eval()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _shadow_eval()
        return function(*args, **kwargs)

    return wrapper


def _shadow_eval() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli") and hasattr(module, "__dict__"):
            # A name of the module comes before the built-in one.
            vars(module).setdefault("eval", literal)
