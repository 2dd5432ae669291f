"""A verdict, and how it writes shares in percent."""

from __future__ import annotations

from dataclasses import dataclass

# From worst to best; the first two make the exit status 1.
LEVELS = ("bad", "look", "hint", "good")


@dataclass(frozen=True)
class Verdict:
    """One thing that the measurements say.

    Attributes:
        level: one of `LEVELS`.
        title: what it is about, in a few words.
        sentence: what was measured, and what an option would change.
        section: the part of the page with the evidence.
    """

    level: str
    title: str
    sentence: str
    section: str


def exit_status(verdicts: list[Verdict]) -> int:
    """0 where all is well, 1 where there is something to look at."""
    return int(any(verdict.level in LEVELS[:2] for verdict in verdicts))


def percent(share: float) -> str:
    """A share in percent, with more digits near 0% and 100%, and never rounded to either."""
    if 0 < share < 1:
        for digits in (0, 1, 2, 3) if 0.1 <= share <= 0.9 else (1, 2, 3):
            text = f"{100 * share:.{digits}f}"
            if float(text) not in (0.0, 100.0):
                return f"{text}%"
        return "under 0.001%" if share < 0.5 else "over 99.999%"
    return f"{100 * share:.0f}%"
