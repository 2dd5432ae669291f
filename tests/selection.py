"""A few of all combinations for the default run; the others are marked slow."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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


def every_pair(**parameters: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test over all combinations of values; most of them are slow.

    By default few combinations run, in which any two values of two parameters occur together: each is chosen
    for the most pairs that do not occur yet, the first of those that have as many.

    Args:
        parameters: by the name of each, its values, or by their names in the ids its values.
    """
    named = [_named(values) for values in parameters.values()]
    combinations = list(itertools.product(*(range(len(values)) for values in named)))
    missing = set().union(*map(_pairs, combinations))
    by_default = set()
    while missing:
        best = max(combinations, key=lambda combination: len(_pairs(combination) & missing))
        by_default.add(best)
        missing -= _pairs(best)
    rows = []
    for combination in combinations:
        names, values = zip(*(named[i][value] for i, value in enumerate(combination)))
        marks = slow_unless(combination in by_default)
        rows.append(pytest.param(*values, id="-".join(names), marks=marks))
    return pytest.mark.parametrize(tuple(parameters), rows)


def _named(values: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return list(values.items())
    return [(str(getattr(value, "name", value)).removeprefix("torch."), value) for value in values]


def _pairs(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """Any two of (parameter, value)."""
    return set(itertools.combinations(enumerate(combination), 2))
