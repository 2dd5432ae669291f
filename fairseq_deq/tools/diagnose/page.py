"""The page: verdicts first, then their evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources

from .measure import STAGES, Measured, Trial
from .reading import reading
from .sections import (
    budgets_section,
    convergence_section,
    equilibrium_section,
    gradient_section,
    jacobian_section,
    table,
    words_section,
)
from .subject import Subject
from .verdict import LEVELS, Verdict, percent

_BADGES = {0: ("good", "Healthy"), 1: ("look", "Something to look at"), 2: ("bad", "Could not be measured")}
_MARKS = {"bad": "✖", "look": "▲", "hint": "→", "good": "✔"}
_WORDS = {"bad": "wrong", "look": "look at this", "hint": "could be cheaper", "good": "fine"}
_SECTIONS = (
    ("model", "What it is"),
    ("convergence", "Convergence"),
    ("budgets", "Other options, tried"),
    ("text-section", "The text"),
    ("words", "Words"),
    ("jacobian", "The Jacobian"),
    ("gradient", "The gradient"),
    ("equilibrium", "Is it an equilibrium?"),
)


def refusal_page(path: str, verdicts: Sequence[Verdict]) -> str:
    """The page of a checkpoint that could not be measured.

    Args:
        path: where it is.
        verdicts: why.
    """
    return _document(path, _head(path, 2, "", verdicts), [])


def report_page(
    subject: Subject,
    m: Measured,
    verdicts: Sequence[Verdict],
    status: int,
    seconds: float,
    other: tuple[Subject, Measured, Sequence[Verdict]] | None = None,
) -> str:
    """The page of a checkpoint.

    Args:
        subject: the model.
        m: what was measured of it.
        verdicts: what that says.
        status: exit status of the command.
        seconds: that it took.
        other: another checkpoint to compare with, likewise; None: there is none.
    Returns:
        HTML that needs no other file.
    """
    links = [name for name, _ in _SECTIONS if m.spectra is not None or name not in ("jacobian", "gradient")]
    menu = "".join(f'<a href="#{name}">{title}</a>' for name, title in _SECTIONS if name in links)
    if other is not None:
        menu = '<a href="#compare">Comparison</a>' + menu
    head = _head(subject.path, status, _conditions(subject, m), verdicts) + f"<nav>{menu}</nav>"
    titles = dict(_SECTIONS)
    compared = None if other is None else other[1]
    bodies = {
        "model": _model(m),
        "convergence": convergence_section(m, compared),
        "budgets": budgets_section(m),
        "text-section": reading(subject, m, compared),
        "words": words_section(m),
        "equilibrium": equilibrium_section(m, compared),
    }
    if m.spectra is not None:
        bodies["jacobian"] = jacobian_section(m.spectra)
    if m.gradients is not None:
        bodies["gradient"] = gradient_section(m.gradients)
    sections = [f"<section id={name}><h2>{titles[name]}</h2>{bodies[name]}</section>" for name in links]
    if other is not None:
        sections.insert(0, f"<section id=compare><h2>Comparison</h2>{_compared(m, *other)}</section>")
    sections.append(f"<footer>fairseq-deq-diagnose, {len(STAGES)} stages in {seconds:.0f} s.</footer>")
    return _document(subject.path, head, sections)


def _document(path: str, head: str, sections: Sequence[str]) -> str:
    style, script = (
        resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark"><link rel=icon href="data:,">'
        f"<title>{escape(path)}: the equilibrium</title><style>{style}</style></head>"
        f"<body><main>{head}{''.join(sections)}</main><script>{script}</script></body></html>\n"
    )


def _head(path: str, status: int, conditions: str, verdicts: Sequence[Verdict]) -> str:
    level, badge = _BADGES[status]
    items = "".join(_item(verdict) for verdict in verdicts if verdict.level != "good")
    fine = "".join(_item(verdict) for verdict in verdicts if verdict.level == "good")
    name = escape(path).replace("/", "/<wbr>")
    return (
        f"<header><p class='badge {level}'>{_MARKS[level]} {badge}</p><h1>{name}</h1>{conditions}"
        f"<ul class=verdicts>{items}{fine}</ul></header>"
    )


def _item(verdict: Verdict) -> str:
    assert verdict.level in LEVELS
    return (
        f"<li class={verdict.level}><i title='{_WORDS[verdict.level]}'>{_MARKS[verdict.level]}</i><div>"
        f"<a href='#{verdict.section}'>{_text(verdict.title)}.</a> {_text(verdict.sentence)}</div></li>"
    )


def _text(sentence: str) -> str:
    """A sentence, in which no option is broken across lines."""
    return re.sub(r"(--[a-z][a-z-]+)", r"<span class=o>\1</span>", escape(sentence))


def _conditions(subject: Subject, m: Measured) -> str:
    rows, length, blocks = m.shape
    context = int(subject.options.get("mem_len", 0) or 0)
    memory = f" and a memory of up to {context}" if context else ""
    part = "the first " if len(m.passed.loss) < subject.tokens_in_all - length * rows else ""
    return (
        f"<p class=lead>Perplexity <b>{m.passed.perplexity:.2f}</b>, {m.bits_per_byte:.3f} bits per byte, on "
        f"{part}{len(m.passed.loss):,} of the {subject.tokens_in_all:,} tokens of {escape(subject.source)}: "
        f"{rows} rows in {blocks} blocks of {length}{memory}; --f-thres {m.budget}, tolerance "
        f"{m.tolerance:g}; {percent(float(m.passed.converged.float().mean()))} converged, mean residual "
        f"{m.passed.summary()['residual']:.1e}.</p>"
    )


def _model(m: Measured) -> str:
    layer = int(m.facts["layer parameters"])
    depth = float(m.passed.evaluations.float().mean())
    facts = {k: v for k, v in m.facts.items() if k != "layer parameters"} | {
        "effective depth": f"{depth:.1f} evaluations per position; a stack of as many layers with weights of "
        f"their own would have {layer * depth:,.0f} parameters",
        "bytes": f"{m.bytes:,} in the text as the dictionary writes it; bits per byte refer to these",
    }
    options = "".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in m.solver.items())
    return (
        table(["", ""], facts.items()) + f"<h3>Options of its solves</h3><div class=options>{options}</div>"
    )


def _compared(m: Measured, other: Subject, theirs: Measured, verdicts: Sequence[Verdict]) -> str:
    """Numbers of both, and what is to be said of the other."""

    def line(name: str, values: tuple[float, float], form: str) -> tuple[str, ...]:
        shown = [format(v, form) if math.isfinite(v) else "none" for v in values]
        return (name, *shown)

    def both(name: str, form: str) -> tuple[str, ...]:
        mine, its = (x.passed.summary()[name] for x in (m, theirs))
        return line(name, (mine, its), form)

    def radius(x: Measured) -> float:
        return x.spectra.largest[0] if x.spectra is not None else math.nan

    def cosine(x: Measured) -> float:
        own = x.gradients.of(x.gradients.own) if x.gradients is not None else None
        return math.nan if own is None else own.cosine

    lines = [
        both("perplexity", ".2f"),
        line("bits per byte", (m.bits_per_byte, theirs.bits_per_byte), ".3f"),
        both("converged", ".4f"),
        both("evaluations", ".2f"),
        both("residual", ".1e"),
        line("backward converged", (m.backward_converged, theirs.backward_converged), ".4f"),
        line("largest radius", (radius(m), radius(theirs)), ".2f"),
        line("cosine of the gradient", (cosine(m), cosine(theirs)), ".4f"),
        *(_trial_line(a, b) for a, b in zip(m.budgets, theirs.budgets) if a.budget == b.budget),
    ]
    items = "".join(_item(verdict) for verdict in verdicts)
    return (
        table(["", "this one", "the other"], lines)
        + f"<h3>Verdicts on the other, {escape(other.path)}</h3><ul class=verdicts>{items}</ul>"
    )


def _trial_line(a: Trial, b: Trial) -> tuple[str, ...]:
    return (f"perplexity at budget {a.budget}", f"{a.perplexity:.2f}", f"{b.perplexity:.2f}")
