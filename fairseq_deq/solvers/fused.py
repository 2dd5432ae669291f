"""Rules of a solve in few kernels: compiled by torch where the books are on a device and that is asked for.

On a device every small operation costs a launch, whatever it computes. The rules that judge a lane and the
least squares of a lane are elementwise over lanes, so a compiler makes one kernel of each. It is off unless
`fuse()` is called or the environment variable FAIRSEQ_DEQ_FUSE is 1: the first solve then takes a minute
longer. Results are those of the rules as they stand, up to rounding. Solves on the CPU are never compiled.
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

# The elimination is written out for at most so many unknowns: code grows with their cube.
_MOST_UNKNOWNS = 8
_enabled = os.environ.get("FAIRSEQ_DEQ_FUSE") == "1"


def fuse(enabled: bool = True) -> None:
    """Compile the rules of later solves on a device, or do not."""
    global _enabled
    _enabled = enabled


def fusing(books: Any, unknowns: int = 0) -> bool:
    """Whether rules over `books` are compiled, with that many unknowns in a lane's least squares."""
    return _enabled and isinstance(books, Tensor) and unknowns <= _MOST_UNKNOWNS


def fused(rule: Rule) -> Rule:
    """The rule, compiled where that is asked for; the first array among its arguments is one of the books.

    Where it cannot be compiled, that is said once, and all rules go on as they stand.
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
    """A number that compiled rules are given: beside the books, or each call would make it anew."""
    if not fusing(books):
        return value
    return torch.full((), value, dtype=torch.float64, device=books.device)


def _first_array(args: tuple[Any, ...]) -> Any:
    return next((a for a in args if isinstance(a, (Tensor, np.ndarray))), None)


# ---------------------------------------------------------------------- Anderson, for compilation


@fused
def columns(like: Tensor, products: list[Tensor], g: Tensor, fz: Tensor) -> Tensor:
    """The inner products (n,) of a method, |g|^2 and |f(z)|^2, as books (k, n) in float64."""
    return torch.stack([*products, vecdot(g, g), vecdot(fz, fz)]).to(like.dtype)


@fused
def new_difference(
    forget: Tensor, z: Tensor, g: Tensor, last_z: Any, last_g: Any, dz: list[Tensor], dg: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The newest differences of z and g, and the inner products that they bring.

    Args:
        forget: (n,) bool, lanes at which all differences become zero, the older ones in place.
        z, g, last_z, last_g: the states and f(z) - z of this and of the last iteration, (n, D).
        dz, dg: the older differences.
    Returns:
        DZ_new, DG_new, and <DG_j, DG_new> of the older ones, then of the new one, then <DG_new, g>.
    """
    lanes = forget.unsqueeze(1)
    for history in (*dz, *dg):
        history.masked_fill_(lanes, 0)
    new = (g - last_g).masked_fill(lanes, 0)
    return (z - last_z).masked_fill(lanes, 0), new, [vecdot(d, new) for d in (*dg, new, g)]


@fused
def mixed(
    gram: Tensor,
    rhs: Tensor,
    forget: Tensor,
    products: Tensor,
    newest: Tensor,
    ridge: Any,
    z: Tensor,
    g: Tensor,
    dz: list[Any],
    dg: list[Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anderson's least squares: gamma = argmin |g - DG*gamma|.

    Args:
        gram, rhs: (slots, slots, n) and (slots, n).
        forget: (n,) bool, lanes without a history.
        products: <DG_j, DG_new> for all j, and <DG_new, g>, (slots + 1, n).
        newest: (slots,) bool, the slot of the new difference.
        ridge: relative to the squared lengths of the columns.
        z, g, dz, dg: the states, f(z) - z, and the differences of both.
    Returns:
        the Gram matrix and DG^T g, brought up to date, g - DG*gamma and z - DZ*gamma.
    """
    row, last = products[:-1], products[-1]
    gram, rhs = torch.where(forget, 0.0, gram), torch.where(forget, 0.0, rhs)
    gram = torch.where(newest[:, None, None], row, torch.where(newest[:, None], row[:, None], gram))
    rhs = torch.where(newest[:, None], last, rhs + row)
    gamma, left, following = _least_squares(gram, rhs, ridge), g, z
    for i in range(len(dz)):
        weight = gamma[i].to(z.dtype).unsqueeze(-1)
        left, following = left - dg[i] * weight, following - dz[i] * weight
    return gram, rhs, left, following


def _least_squares(gram: Tensor, rhs: Tensor, ridge: Any) -> Tensor:
    """gamma, (slots, n), a vector over the lanes for each entry of the system."""
    slots = range(gram.shape[0])
    known = [gram[i, i] > 0 for i in slots]
    scale = [torch.where(known[i], torch.where(known[i], gram[i, i], 1.0) ** -0.5, 0.0) for i in slots]
    left = [
        [torch.ones_like(rhs[i]) + ridge if i == j else gram[i, j] * scale[i] * scale[j] for j in slots]
        for i in slots
    ]
    right = gauss_jordan(left, [rhs[i] * scale[i] for i in slots])
    gamma = torch.stack([right[i] * scale[i] for i in slots])
    return torch.where(torch.isfinite(gamma.sum(0)), gamma, 0.0)


def gauss_jordan(left: list[list[Any]], right: list[Any]) -> list[Any]:
    """x with left x = right, of numbers or tensors (n,), without pivots: `left` is positive definite.

    Both lists are overwritten.
    """
    slots = range(len(right))
    for p in slots:
        pivot = left[p][p]
        row, own = [left[p][j] / pivot for j in slots], right[p] / pivot
        for i in slots:
            if i != p:
                factor = left[i][p]
                left[i] = [left[i][j] - factor * row[j] if j > p else left[i][j] for j in slots]
                right[i] = right[i] - factor * own
        left[p], right[p] = row, own
    return right


@fused
def settled(moving: Tensor, lost: Tensor, z: Tensor, best: Tensor, following: Tensor, fz: Tensor) -> Tensor:
    """The next states: `following`, or f(z) where that is not finite, for lanes that move; their best one for
    lost ones; z for all others."""
    sound = torch.isfinite(torch.linalg.vector_norm(following, dim=1, keepdim=True))
    rest = torch.where(lost.unsqueeze(1), best, z)
    return torch.where((moving & ~lost).unsqueeze(1), torch.where(sound, following, fz), rest)
