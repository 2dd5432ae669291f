"""The fault: fairseq's tools print numbers of a model without saying whether its solves have succeeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """After `function`, say how many positions converged, and refuse the result if f was not finite.

    Where f is never finite, the solve returns its start. Its perplexity, or its text, looks like any other.
    """
    from ..solve_report import SolveReport

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with SolveReport() as report:
            result = function(*args, **kwargs)
        report.log()
        return result

    return wrapper
