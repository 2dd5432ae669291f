"""Tests over all combinations of several parameters, of which a few run by default."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


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
        marks = () if combination in by_default else (pytest.mark.slow,)
        rows.append(pytest.param(*values, id="-".join(names), marks=marks))
    return pytest.mark.parametrize(tuple(parameters), rows)


def _named(values: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return list(values.items())
    return [(str(getattr(value, "name", value)).removeprefix("torch."), value) for value in values]


def _pairs(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """Any two of (parameter, value)."""
    return set(itertools.combinations(enumerate(combination), 2))
