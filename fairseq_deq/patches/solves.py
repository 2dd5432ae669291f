"""fairseq's tools print numbers of a model whether its solves have succeeded or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Say after `function` how many positions converged, and refuse what is not finite.

    A layer that was never finite keeps its start as equilibrium, and gives a perplexity, or a text, that
    looks like any other.
    """
    from ..solve_report import SolveReport

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with SolveReport() as report:
            result = function(*args, **kwargs)
        report.log()
        return result

    return wrapper
