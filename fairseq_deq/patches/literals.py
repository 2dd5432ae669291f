"""The fault: fairseq evaluates strings of a configuration as Python code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..literals import literal


def reading_literals(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give all modules of fairseq an `eval` that only reads literals, now and before each call of `function`.

    Modules may be imported later. `function` reads a checkpoint or builds a model or a criterion, so they
    have the new `eval` before any of this happens.
    """
    _shadow_eval()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _shadow_eval()
        return function(*args, **kwargs)

    return wrapper


def _shadow_eval() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli") and hasattr(module, "__dict__"):
            # A module's own name is found before the built-in one.
            vars(module).setdefault("eval", literal)
