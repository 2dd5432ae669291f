"""Replacing a function of fairseq once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_fairseq_deq_patch"


def replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function `owner.name` by `wrap(function)`, once for each `wrap`.

    Args:
        owner: the module or class that holds the function.
        name: the function's name in it; nothing happens if the owner has none, so that a fairseq without the
            function is left alone.
        wrap: takes the function and returns the one to use; what it replaced stays reachable as its
            `__wrapped__`.
    """
    original = getattr(owner, name, None)
    applied = getattr(original, _MARK, ())
    if original is None or wrap in applied:
        return
    replacement = functools.wraps(original)(wrap(original))
    setattr(replacement, _MARK, (*applied, wrap))
    is_static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)
