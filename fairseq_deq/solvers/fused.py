"""Compile the rules of a solve into few kernels, for solves on a GPU and only if asked.

On a device every small operation costs a launch, whatever it computes. The rules that judge a lane and the
least squares of a lane are elementwise over lanes, so a compiler makes one kernel of each. It is off unless
`fuse()` is called or the environment variable FAIRSEQ_DEQ_FUSE is 1: the first solve then takes a minute
longer. Results equal those of the uncompiled rules, up to rounding. Solves on the CPU are never compiled.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

logger = logging.getLogger(__name__)
Rule = TypeVar("Rule", bound=Callable[..., Any])

_enabled = os.environ.get("FAIRSEQ_DEQ_FUSE") == "1"


def fuse(enabled: bool = True) -> None:
    """Turn the compilation of rules on or off, for later solves on a GPU."""
    global _enabled
    _enabled = enabled


def fusing(books: Any) -> bool:
    """Whether rules over `books` are compiled."""
    return _enabled and isinstance(books, Tensor)


def fused(rule: Rule) -> Rule:
    """Decorator: compile the rule if asked; the first array among its arguments must be one of the books.

    If a rule cannot be compiled, a warning says so once, and all rules run uncompiled.
    """
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(rule)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # a part of another rule
            return rule(*args)
        if not (_enabled and isinstance(_first_array(args), Tensor)):
            return rule(*args)
        if not compiled:
            compiled.append(torch.compile(rule, dynamic=True))
        try:
            return compiled[0](*args)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            fuse(False)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.warning(f"the rules of solves cannot be compiled here and go on uncompiled: {reason}")
            return rule(*args)

    return cast(Rule, call)


def constant(value: float, books: Any) -> Any:
    """A number for compiled rules: a tensor on the device of the books, so that no call makes it anew."""
    if not fusing(books):
        return value
    return torch.full((), value, dtype=torch.float64, device=books.device)


def _first_array(args: tuple[Any, ...]) -> Any:
    return next((a for a in args if isinstance(a, (Tensor, np.ndarray))), None)


# ---------------------------------------------------------------------- rules of the loop


@fused
def columns(like: Tensor, products: list[Tensor], g: Tensor, fz: Tensor) -> Tensor:
    """The inner products (n,) of a method, |g|^2 and |f(z)|^2, as books (k, n) in float64."""
    return torch.stack([*products, vecdot(g, g), vecdot(fz, fz)]).to(like.dtype)


@fused
def settled(moving: Tensor, lost: Tensor, z: Tensor, best: Tensor, following: Tensor, fz: Tensor) -> Tensor:
    """The next states: `following`, or f(z) where that is not finite, for lanes that move; their best one for
    lost ones; z for all others."""
    sound = torch.linalg.vector_norm(following, dim=1, keepdim=True) < torch.inf  # nor NaN
    rest = torch.where(lost.unsqueeze(1), best, z)
    return torch.where((moving > lost).unsqueeze(1), torch.where(sound, following, fz), rest)
