"""The evidence, section by section, as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import torch

from ...solvers import Status
from ..evaluation import Word
from .gradients import Gradients
from .measure import Measured
from .pictures import Mark, Series, bars, chart
from .solves import Curve, shares
from .spectra import LARGE_RADIUS, Spectra
from .verdict import percent

_MOST_BARS = 30


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of texts, the first column naming each line."""
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads) if any(heads) else ""
    body = "".join(
        f"<tr><th scope=row>{escape(str(line[0]))}</th>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _grid(*figures: str) -> str:
    return f"<div class=grid>{''.join(figures)}</div>"


def convergence_section(m: Measured, other: Measured | None) -> str:
    """Residual against work, histograms, position in the block, time."""
    names = ["this one", "the other"] if other is not None else [""]
    both = [m] if other is None else [m, other]
    figures = []
    if m.forward:
        figures.append(
            _figure(_curves(m.forward, m.tolerance), "Forward solve, mean over the positions of a batch.")
        )
    if m.backward:
        caption = "Linear solve of the backward pass, on the same batch; GMRES takes each row as one unknown."
        figures.append(_figure(_curves(m.backward, m.backward_tolerance), caption))
    figures.append(_evaluations([x.passed.evaluations for x in both], names, m.budget, "Forward"))
    ends = torch.cat([torch.nan_to_num(x.passed.residual, nan=10.0, posinf=10.0).flatten() for x in both])
    low, high = (math.log10(max(float(v), 1e-8)) for v in (ends.min(), ends.max()))
    edges = [
        10 ** (k / 4)
        for k in range(math.floor(4 * low), max(math.ceil(4 * high), math.floor(4 * low) + 4) + 1)
    ]
    groups = [
        (name, shares(torch.nan_to_num(x.passed.residual, nan=10.0, posinf=10.0).flatten(), edges))
        for name, x in zip(names, both)
    ]
    labels = [f"{e:.0e}".replace("e-0", "e-").replace("e+0", "e") for e in edges[:-1]]
    place = 4 * math.log10(m.tolerance / edges[0])
    mark = place if 0 <= place <= len(labels) else None
    picture = bars(groups, labels, "relative residual, from", "share of positions", mark, "tolerance")
    figures.append(_figure(picture, "Final residuals of the forward solve."))
    if m.backward_evaluations:
        found = torch.tensor(m.backward_evaluations)
        figures.append(_evaluations([found], [""], m.backward_budget, "Backward"))
    series = [
        Series(name, list(enumerate(x.by_position[0])), "line")
        for name, x in zip(names, both)
        if x.by_position[0]
    ]
    caption = "Mean evaluations at each position of a block."
    figures.append(_figure(chart(series, "position in the block", "evaluations"), caption))
    lines = [(status.name, percent(m.share(status)), status.sentence) for status in Status if m.share(status)]
    inside = ""
    if m.inside is not None:
        inside = (
            f"<p>{percent(m.inside.share)} of the time of a forward solve is spent inside f "
            f"({1000 * m.inside.seconds:.0f} ms for a block); the rest in the solver itself.</p>"
        )
    return inside + _grid(*figures) + table(["status", "positions", "meaning"], lines)


def _curves(curves: Sequence[Curve], tolerance: float) -> str:
    series = [Series(c.name, list(zip(c.work, c.residual))) for c in curves]
    marks = [Mark(tolerance, "y", "tolerance")]
    return chart(series, "evaluations computed per position", "relative residual", True, True, marks)


def _evaluations(found: Sequence[torch.Tensor], names: Sequence[str], cap: int, word: str) -> str:
    """Histogram of the evaluations of the positions."""
    most = max(max(int(x.max()) for x in found), 1)
    width = -(-most // _MOST_BARS)
    edges = [1 + k * width for k in range(-(-most // width) + 1)]
    groups = [(name, shares(x.flatten(), edges)) for name, x in zip(names, found)]
    labels = [str(e) for e in edges[:-1]]
    mark = (cap - 1) // width + 1 if cap <= most else None
    picture = bars(groups, labels, "evaluations", "share of positions", mark, "cap")
    return _figure(picture, f"{word} evaluations until a position stops moving; the cap is {cap}.")


def budgets_section(m: Measured) -> str:
    """What other tolerances and budgets make of the first blocks."""

    def line(t: object) -> tuple[str, ...]:
        own = " (its own)" if t == m.own else ""
        return (
            *(f"{t.budget}{own}", f"{t.tolerance:g}", f"{t.perplexity:.2f}", f"{t.loss:.4f}"),  # type: ignore[attr-defined]
            *(f"{t.evaluations:.2f}", percent(t.converged), f"{t.residual:.1e}"),  # type: ignore[attr-defined]
        )

    heads = ["--f-thres", "--f-eps", "perplexity", "loss", "evaluations", "converged", "residual"]
    trials = [*m.budgets, *(t for t in m.tolerances if t != m.own)]
    return (
        "<p>Each line is a pass over the first blocks of the text with this checkpoint and other options.</p>"
        + table(heads, map(line, trials))
    )


def words_section(m: Measured) -> str:
    """The hardest and easiest types, and difficulty against frequency."""

    def lines(words: Sequence[Word]) -> list[tuple[str, ...]]:
        return [
            (w.word, str(w.count), f"{w.evaluations:.1f}", f"{w.residual:.1e}", f"{w.loss:.2f}")
            for w in words
        ]

    heads = ["word read", "times", "evaluations", "residual", "loss of the next word"]
    points = [(float(count), evaluations) for count, evaluations in m.frequency]
    picture = chart([Series("", points, "dots")], "times in the text", "evaluations", log_x=True)
    return _grid(
        f"<div><h3>Hardest to solve</h3>{table(heads, lines(m.hardest))}</div>",
        f"<div><h3>Easiest</h3>{table(heads, lines(m.easiest))}</div>",
        _figure(
            picture,
            "Mean evaluations of a word against how often it occurs in this text; rare words are left out.",
        ),
    )


def jacobian_section(s: Spectra) -> str:
    """Radii, eigenvalues and singular values."""
    radii = chart(
        [Series("", list(zip(s.places, s.radii)))],
        "position in the block",
        "spectral radius",
        marks=[
            Mark(1.0, "y", "1"),
            *([Mark(LARGE_RADIUS, "y", "large")] if max(s.radii) > LARGE_RADIUS / 2 else []),
        ],
    )
    mean = chart([Series("mean Jacobian", s.mean_eigenvalues, "dots")], "real", "imaginary", circle=True)
    figures = [
        _figure(
            radii,
            "Largest |eigenvalue| of a position's own block, over the rows; f is causal, so these are "
            "the eigenvalues of the whole.",
        ),
        _figure(mean, "Eigenvalues of the mean Jacobian of a position, and the unit circle."),
    ]
    if s.block_eigenvalues:
        series = [Series(f"{name} position", points, "dots") for name, points in s.block_eigenvalues.items()]
        figures.append(
            _figure(
                chart(series, "real", "imaginary", circle=True),
                "Eigenvalues at three positions, by their evaluations.",
            )
        )
    values = list(enumerate(s.singular_values, 1))
    marks = [Mark(s.rank, "x", f"rank {s.rank}")] if s.rank else []
    caption = (
        f"Singular values of the mean Jacobian; the preconditioner knows the {s.rank} on the left."
        if s.rank
        else "Singular values of the mean Jacobian; this model's solves use no preconditioner."
    )
    figures.append(
        _figure(chart([Series("", values, "line")], "number", "singular value", marks=marks), caption)
    )
    return _grid(*figures)


def gradient_section(g: Gradients) -> str:
    """Every mode beside the exact gradient; error against tolerance."""
    lines = []
    for mode in g.modes:
        own = " (its own)" if mode.mode == g.own else ""
        if mode.cosine == mode.cosine:
            cells = (
                f"{mode.cosine:.4f}",
                f"{mode.norm:.3g}",
                f"{mode.error:.1e}",
                f"{mode.seconds:.2f}",
                mode.remark,
            )
        else:
            cells = ("none", "", "", "", mode.remark or "not finite")
        lines.append((mode.mode + own, *cells))
    heads = ["--gradient", "cosine", "length", "error", "seconds", ""]
    picture = chart([Series("", g.by_tolerance)], "tolerance of both solves", "relative error", True, True)
    return (
        "<p>Gradient of the loss of one batch, without dropout, with respect to the layer and its injection, "
        "compared with one whose solves reached 1e-6.</p>"
        + table(heads, lines)
        + _grid(
            _figure(
                picture,
                "Error of ift against the tolerance of its solves; it jumps where f has kinks (ReLU).",
            )
        )
    )


def equilibrium_section(m: Measured, other: Measured | None) -> str:
    """Budgets beyond the trained one, random starts, what must not change a state."""
    both = [("this one", m)] + ([("the other", other)] if other is not None else [])
    series = [
        Series(
            name if other is not None else "", [(t.budget, t.perplexity) for t in x.budgets if t.budget > 1]
        )
        for name, x in both
    ]
    marks = [Mark(m.budget, "x", "trained")]
    caption = "Perplexity of the first blocks against the evaluations allowed, from two on."
    figures = [_figure(chart(series, "evaluations allowed", "perplexity", True, True, marks), caption)]
    text = []
    if m.starts is not None:
        count = len(m.starts.distances)
        points = [((k + 1) / count, d) for k, d in enumerate(m.starts.distances)]
        picture = chart(
            [Series("", points[:: max(1, count // 200)], "line")],
            "share of positions",
            "distance",
            log_y=True,
        )
        figures.append(
            _figure(picture, "How far solves from random states end from the model's own, sorted.")
        )
        shown = ", ".join(percent(share) for share in m.starts.converged)
        text.append(
            f"From {len(m.starts.converged)} random starts {shown} of the positions converge; "
            f"{percent(m.starts.apart)} of those that do end at another state."
            + (f" They were {m.starts.remark}." if m.starts.remark else "")
        )
    if m.invariances is not None:
        causal, batch = m.invariances.causal, m.invariances.batch_invariant
        text.append(
            f"Changing a token {'does not change' if causal else 'changes'} the states before it; a row by "
            f"itself {'has' if batch else 'does not have'} the same states as in its batch."
        )
    return "".join(f"<p>{escape(t)}</p>" for t in text) + _grid(*figures)
