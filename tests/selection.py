"""A few of all combinations for the default run; the others are marked slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

import pytest

Left = TypeVar("Left", bound=Hashable)
Right = TypeVar("Right", bound=Hashable)


def covering(pairs: Iterable[tuple[Left, Right]]) -> list[tuple[Left, Right]]:
    """Some of the pairs, in which every left and every right value occurs.

    Each left value takes the right value that was taken least so far, and each right value that nobody took
    takes such a left value; of several, the first.
    """
    pairs = list(pairs)
    taken: Counter[Hashable] = Counter()
    chosen = []
    for left in dict.fromkeys(left for left, _ in pairs):
        right = min((right for one, right in pairs if one == left), key=lambda right: taken["right", right])
        taken.update([("left", left), ("right", right)])
        chosen.append((left, right))
    for right in dict.fromkeys(right for _, right in pairs):
        if not taken["right", right]:
            left = min((left for left, one in pairs if one == right), key=lambda left: taken["left", left])
            taken.update([("left", left)])
            chosen.append((left, right))
    return chosen


def slow_unless(is_default: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a combination."""
    return () if is_default else (pytest.mark.slow,)


def few_of(pairs: Iterable[tuple[Left, Right]]) -> list:
    """All pairs as parameters of a test; `covering` has those of the default run."""
    pairs = list(pairs)
    chosen = covering(pairs)
    return [pytest.param(*pair, marks=slow_unless(pair in chosen)) for pair in pairs]
