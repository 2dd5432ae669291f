"""Charts as plain SVG, coloured by the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: what the legend calls them; empty: they are not in it.
        points: (x, y) each; what is not finite is left out.
        style: `line`, `dots`, or `both`.
        colour: number of its colour; None: the next one.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "both"
    colour: int | None = None


@dataclass(frozen=True)
class Mark:
    """A straight line across a chart, with a word on it.

    Attributes:
        value: where, on the axis `axis`.
        axis: `x` or `y`.
        word: what it says.
    """

    value: float
    axis: str
    word: str


def chart(
    series: Sequence[Series],
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Iterable[Mark] = (),
    circle: bool = False,
) -> str:
    """Lines or points in a plane.

    Args:
        series: what to draw.
        x, y: what the axes say.
        log_x, log_y: whether an axis is logarithmic; values of 0 and below are left out then.
        marks: lines across.
        circle: draw the unit circle, at the same scale on both axes.
    Returns:
        an SVG with its legend, in HTML; a sentence where there is nothing to draw.
    """
    kept = [Series(s.name, _sound(s.points, log_x, log_y), s.style, s.colour) for s in series]
    points = [p for s in kept for p in s.points]
    if not points:
        return "<p class=none>Nothing finite to draw.</p>"
    marks = [m for m in marks if math.isfinite(m.value) and (m.value > 0 or not (log_x or log_y))]
    xs = [p[0] for p in points] + [m.value for m in marks if m.axis == "x"]
    ys = [p[1] for p in points] + [m.value for m in marks if m.axis == "y"]
    if circle:
        xs, ys = _square([*xs, -1.05, 1.05], [*ys, -1.05, 1.05])
    to_x = _scale(xs, log_x, _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(ys, log_y, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x, y, (xs, log_x, to_x), (ys, log_y, to_y))]
    if circle:
        parts.append(
            f'<ellipse class=unit cx="{to_x(0):.1f}" cy="{to_y(0):.1f}" rx="{to_x(1) - to_x(0):.1f}" '
            f'ry="{to_y(0) - to_y(1):.1f}"/>'
        )
    for mark in marks:
        parts.append(_mark(mark, to_x, to_y))
    names = []
    for i, s in enumerate(kept):
        colour = i % 7 if s.colour is None else s.colour
        places = [(to_x(a), to_y(b)) for a, b in s.points]
        if s.style != "dots" and len(places) > 1:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="l c{colour}" points="{line}"/>')
        if s.style != "line":
            size = 3 if len(places) < 40 else 1.7
            parts += [
                f'<circle class="p c{colour}" cx="{a:.1f}" cy="{b:.1f}" r="{size}"/>' for a, b in places
            ]
        if s.name:
            names.append((colour, s.name))
    return _svg(parts, f"{y} against {x}") + _legend(names)


def bars(
    groups: Sequence[tuple[str, Sequence[float]]],
    labels: Sequence[str],
    x: str,
    y: str,
    mark: float | None = None,
    word: str = "",
) -> str:
    """Bars side by side.

    Args:
        groups: name and heights of each group.
        labels: what stands below each bar; every few are shown where they are many.
        x, y: what the axes say.
        mark: where a line stands, in bars from the left.
        word: what that line says.
    Returns:
        an SVG with its legend, in HTML.
    """
    count = len(labels)
    highest = max((v for _, values in groups for v in values), default=0.0) or 1.0
    to_x = _scale([0, count], False, _LEFT, _WIDTH - _RIGHT, margin=0.0)
    to_y = _scale([0, highest], False, _HEIGHT - _BOTTOM, _TOP, margin=0.0)
    parts = [_axes(x, y), _ticks_y([0, highest], False, to_y)]
    every = max(1, math.ceil(count / 9))
    for i in range(0, count, every):
        parts.append(
            f'<text class=t x="{to_x(i + 0.5):.1f}" y="{_HEIGHT - _BOTTOM + 14}">{escape(labels[i])}</text>'
        )
    wide = (to_x(1) - to_x(0)) * 0.86 / max(len(groups), 1)
    for g, (_, values) in enumerate(groups):
        for i, value in enumerate(values):
            if value > 0:
                left, top = to_x(i + 0.07) + g * wide, to_y(value)
                parts.append(
                    f'<rect class="b c{g}" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" '
                    f'height="{_HEIGHT - _BOTTOM - top:.1f}"/>'
                )
    if mark is not None:
        parts.append(_mark(Mark(mark, "x", word), to_x, to_y))
    names = [(g, name) for g, (name, _) in enumerate(groups) if name]
    return _svg(parts, f"{y} against {x}") + _legend(names)


# ---------------------------------------------------------------------- parts of a chart

Scale = Callable[[float], float]


def _sound(points: Iterable[tuple[float, float]], log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [
        (a, b)
        for a, b in points
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x) and (b > 0 or not log_y)
    ]


def _square(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Both ranges widened to one scale: the unit circle is round."""
    ratio = (_WIDTH - _LEFT - _RIGHT) / (_HEIGHT - _TOP - _BOTTOM)
    half = max(max(map(abs, ys)), (max(xs) - min(xs)) / 2 / ratio)
    middle = (max(xs) + min(xs)) / 2
    return [middle - half * ratio, middle + half * ratio], [-half, half]


def _scale(values: Sequence[float], log: bool, start: float, stop: float, margin: float = 0.03) -> Scale:
    numbers = [math.log10(v) for v in values] if log else list(values)
    low, high = min(numbers), max(numbers)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    room = (high - low) * margin
    low, high = low - room, high + room

    def scale(value: float) -> float:
        number = math.log10(max(value, 1e-300)) if log else value
        return start + (number - low) / (high - low) * (stop - start)

    return scale


def _ticks(values: Sequence[float], log: bool) -> list[float]:
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        if last - first <= 2:
            steps = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        else:
            steps = [10.0**e for e in range(first, last + 1, max(1, (last - first) // 5))]
        steps = [s for s in steps if low * 0.999 <= s <= high * 1.001]
        if len(steps) > 1:
            return steps
    if high - low < 1e-12:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _axes(x: str, y: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    return (
        f'<path class=axis d="M{_LEFT},{_TOP}V{bottom}H{right}"/>'
        f'<text class=a x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 6}">{escape(x)}</text>'
        f'<text class=a transform="translate(12,{(_TOP + bottom) / 2:.0f}) rotate(-90)">{escape(y)}</text>'
    )


def _ticks_y(values: Sequence[float], log: bool, to_y: Scale) -> str:
    return "".join(
        f'<path class=grid d="M{_LEFT},{to_y(v):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="t e" x="{_LEFT - 5}" y="{to_y(v) + 4:.1f}">{_number(v)}</text>'
        for v in _ticks(values, log)
    )


def _frame(
    x: str,
    y: str,
    across: tuple[Sequence[float], bool, Scale],
    up: tuple[Sequence[float], bool, Scale],
) -> str:
    xs, log_x, to_x = across
    below = "".join(
        f'<text class=t x="{to_x(v):.1f}" y="{_HEIGHT - _BOTTOM + 14}">{_number(v)}</text>'
        for v in _ticks(xs, log_x)
    )
    return _ticks_y(*up) + below + _axes(x, y)


def _mark(mark: Mark, to_x: Scale, to_y: Scale) -> str:
    word = escape(mark.word)
    if mark.axis == "y":
        place = to_y(mark.value)
        return (
            f'<path class=mark d="M{_LEFT},{place:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="m e" x="{_WIDTH - _RIGHT - 2}" y="{place - 4:.1f}">{word}</text>'
        )
    place = to_x(mark.value)
    side = "e" if place > _WIDTH / 2 else "s"
    return (
        f'<path class=mark d="M{place:.1f},{_TOP}V{_HEIGHT - _BOTTOM}"/>'
        f'<text class="m {side}" x="{place + (-4 if side == "e" else 4):.1f}" y="{_TOP + 10}">{word}</text>'
    )


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(names: Sequence[tuple[int, str]]) -> str:
    if not names:
        return ""
    items = "".join(f'<span><i class="k c{c}"></i>{escape(name)}</span>' for c, name in names)
    return f"<p class=legend>{items}</p>"
