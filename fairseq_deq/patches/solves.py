"""fairseq's tools print numbers of a model whether its solves have succeeded or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._patch import replace


def report_solves_of_tools() -> None:
    """Say beside perplexities and texts how many positions converged, and refuse what is not finite.

    The fault: fairseq-eval-lm, fairseq-validate, fairseq-generate and fairseq-interactive look at the scores
    alone. A layer that was never finite keeps its start as equilibrium, and gives a perplexity, or a text,
    that looks like any other.
    """
    import fairseq_cli.eval_lm
    import fairseq_cli.generate
    import fairseq_cli.interactive
    import fairseq_cli.validate

    replace(fairseq_cli.eval_lm, "eval_lm", _reporting)
    for tool in (fairseq_cli.validate, fairseq_cli.generate, fairseq_cli.interactive):
        replace(tool, "main", _reporting)


def _reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    from ..models.solve_report import SolveReport

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with SolveReport() as report:
            result = function(*args, **kwargs)
        report.log()
        return result

    return wrapper
