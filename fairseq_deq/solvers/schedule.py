"""When a solve evaluates its frozen lanes again."""

from __future__ import annotations

# From one recheck to the next: iterations at least, and the share of those behind at least.
_RECHECK_GAP, _RECHECK_SHARE = 3, 0.1


def recheck_iterations(first: int, budget: int) -> list[int]:
    """The iterations of a solve that evaluate every lane that is not final; they depend on the budget alone,
    never on residuals, so that no lane depends on lanes after it or on other samples."""
    iterations, k = [], first
    while k < budget - 1:
        iterations.append(k)
        k += max(_RECHECK_GAP, round(k * _RECHECK_SHARE))
    return [*iterations, budget - 1]
