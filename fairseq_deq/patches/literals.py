"""fairseq evaluates strings of a configuration as Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..literals import literal
from ._patch import replace


def read_strings_as_literals() -> None:
    """Read literals where fairseq evaluates Python.

    The fault: `eval` is called on strings of the configuration in some thirty places (`utils.eval_str_list`,
    the betas of optimizers, the convolutions of models), and a checkpoint brings its own configuration: a
    file could run any code. Every module of fairseq sees a function of that name that reads literals. Those
    that are imported later are reached before a model is built, and before a checkpoint is read.
    """
    from fairseq import checkpoint_utils
    from fairseq.tasks.fairseq_task import FairseqTask

    _shadow_eval()
    replace(checkpoint_utils, "load_checkpoint_to_cpu", _after_shadowing)
    replace(FairseqTask, "build_model", _after_shadowing)
    replace(FairseqTask, "build_criterion", _after_shadowing)


def _shadow_eval() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli") and hasattr(module, "__dict__"):
            # A name of the module comes before the built-in one.
            vars(module).setdefault("eval", literal)


def _after_shadowing(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _shadow_eval()
        return function(*args, **kwargs)

    return wrapper
