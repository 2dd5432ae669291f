"""Training runs as a picture: a panel for each kind of column, over one axis of updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command import written_whole
from .runs import Run

# Where a solve ran at its cap, or missed its tolerance, is told by lines of this look.
_LIMIT = {"color": "0.35", "linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.0}
_SWITCH = {"color": "0.35", "linestyle": (0, (6, 3)), "linewidth": 1.0}
_TRAINING, _BACKWARD, _VALIDATION = "C0", "C1", "C2"  # the colours of a single run


@dataclass(frozen=True)
class Panel:
    """One picture of the figure.

    Attributes:
        title: above the picture.
        columns: the columns of the log that are drawn in it.
        log_scale: whether the vertical axis is logarithmic.
        limits: the options that these columns should stay below.
    """

    title: str
    columns: tuple[str, ...]
    log_scale: bool = False
    limits: tuple[str, ...] = ()


PANELS = (
    Panel("perplexity", ("ppl",), log_scale=True),
    Panel("loss (bits per token)", ("loss",)),
    Panel("evaluations of f", ("f_nfe", "b_nfe", "f_lane_nfe", "b_lane_nfe"), limits=("f_thres", "b_thres")),
    Panel("residual", ("f_res", "b_res"), log_scale=True, limits=("f_eps", "b_eps")),
    Panel("converged share", ("f_conv", "b_conv")),
    Panel("seconds per update", ("step_time",)),
    Panel("spectral radius", ("sradius",)),
    Panel("Jacobian penalty", ("jac",), log_scale=True),
    Panel("learning rate", ("lr",)),
    Panel("norm of the gradient", ("gnorm",), log_scale=True),
)


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Attributes:
        label: what it is, in words.
        points: value by number of updates.
        style: how matplotlib draws it.
    """

    label: str
    points: dict[int, float]
    style: dict[str, Any]


def lines_of(panel: Panel, runs: Sequence[Run]) -> Iterator[Line]:
    """The curves of a panel.

    A single run has a colour for training, one for its backward solve and one for validation; several have a
    colour each, and the backward solve is dashed. What is counted per position is dotted, and validation has
    dots.
    """
    for number, run in enumerate(runs):
        for column in panel.columns:
            is_backward, per_position = column.startswith("b_"), "_lane_" in column
            for part, curves in (("training", run.train), ("validation", run.valid)):
                if column not in curves:
                    continue
                words = [
                    *([run.name] if len(runs) > 1 else []),
                    part,
                    *({"f": ["forward solve"], "b": ["backward solve"]}.get(column.partition("_")[0], [])),
                    *(["per position"] if per_position else []),
                ]
                style: dict[str, Any] = {"linestyle": "-", "linewidth": 1.2}
                if len(runs) > 1:
                    style["color"] = f"C{number}"
                    style["linestyle"] = "--" if is_backward else "-"
                else:
                    style["color"] = _BACKWARD if is_backward else _TRAINING
                if per_position:
                    style["linestyle"] = ":" if not (is_backward and len(runs) > 1) else "-."
                if part == "validation":
                    style |= {"marker": "o", "markersize": 3.5}
                    style["color"] = f"C{number}" if len(runs) > 1 else _VALIDATION
                elif len(curves[column]) == 1:
                    style["marker"] = "."
                yield Line(", ".join(words), curves[column], style)


def draw(runs: Sequence[Run], out: Path, title: str = "") -> list[str]:
    """Draw runs into a PNG.

    Args:
        runs: the runs, overlaid.
        out: the picture; a kill leaves no half one.
        title: above the figure.
    Returns:
        the titles of the panels that had something to show.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [(panel, lines) for panel in PANELS if (lines := list(lines_of(panel, runs)))]
    across = min(len(drawn), 3)
    down = math.ceil(len(drawn) / across)
    figure, axes = pyplot.subplots(
        down,
        across,
        figsize=(4.6 * across, 2.9 * down + 0.7),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, (panel, lines) in zip(axes.flat, drawn):
        _draw_panel(axis, panel, lines, runs)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(drawn))
        # The lowest panel of each column says what the shared axis is.
        if len(drawn) - across <= place < len(drawn):
            axis.set_xlabel("updates", fontsize=9)
            axis.xaxis.set_tick_params(labelbottom=True)
    handles = _legend(axes.flat, runs)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), across + 1), fontsize=9
    )
    if title:
        figure.suptitle(title)
    with written_whole(out) as partial:
        figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)
    return [panel.title for panel, _ in drawn]


def _draw_panel(axis: Any, panel: Panel, lines: Sequence[Line], runs: Sequence[Run]) -> None:
    from matplotlib import ticker

    for line in lines:
        updates = sorted(line.points)
        axis.plot(updates, [line.points[update] for update in updates], label=line.label, **line.style)
    values = [value for line in lines for value in line.points.values()]
    limits = {
        run.settings.values[name] for run in runs for name in panel.limits if name in run.settings.values
    }
    for limit in sorted(limits):
        axis.axhline(limit, label="_limit", **_LIMIT)
    for place in sorted({run.switch for run in runs if run.switch is not None}):
        axis.axvline(place, label="_switch", **_SWITCH)
    if panel.log_scale and min(values) > 0:
        axis.set_yscale("log")
        # Perplexities and the like read better as 500 than as 5 x 10^2; small residuals do not.
        if min(values) >= 0.01 and max(values) < 1e5:
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(ticker.LogFormatter(labelOnlyBase=False))
    axis.set_title(panel.title, fontsize=10)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(True, alpha=0.3, which="both")


def _legend(axes: Any, runs: Sequence[Run]) -> list[Any]:
    """What the looks of the lines mean, each said once."""
    from matplotlib.lines import Line2D

    lines = [line for axis in axes for line in axis.get_lines()]
    labels = {line.get_label() for line in lines}

    def entry(label: str, **style: Any) -> Any:
        return Line2D([], [], label=label, **style)

    def occurs(*words: str) -> bool:
        return any(word in str(label) for label in labels for word in words)

    found = []
    if len(runs) == 1:
        found += [entry("training; its forward solve", color=_TRAINING)]
        found += [entry("backward solve", color=_BACKWARD)] if occurs("backward") else []
        found += (
            [entry("validation", color=_VALIDATION, marker="o", markersize=3.5)]
            if occurs("validation")
            else []
        )
    else:
        found += [entry(run.name, color=f"C{number}") for number, run in enumerate(runs)]
        found += [entry("backward solve", color="0.2", linestyle="--")] if occurs("backward") else []
        found += (
            [entry("validation", color="0.2", marker="o", markersize=3.5)] if occurs("validation") else []
        )
    found += [entry("per position", color="0.2", linestyle=":")] if occurs("per position") else []
    found += [entry("cap of the evaluations, tolerance", **_LIMIT)] if "_limit" in labels else []
    found += [entry("switch to the equilibrium", **_SWITCH)] if "_switch" in labels else []
    return found
