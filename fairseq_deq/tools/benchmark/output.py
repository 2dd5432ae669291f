"""The rows of the benchmark as a table and as a picture."""

from __future__ import annotations

import logging
from pathlib import Path

from ..command import written_whole

COLUMNS = {  # column -> (its key, its format)
    "step ms": ("step_ms", ".0f"),
    "ratio": ("ratio", ".2f"),
    "fwd": ("f_ms", ".0f"),
    "bwd": ("b_ms", ".0f"),
    "nfe": ("f_evaluations", ".0f"),
    "b_nfe": ("b_evaluations", ".0f"),
    "lane": ("f_lane_evaluations", ".1f"),
    "b_lane": ("b_lane_evaluations", ".1f"),
    "res": ("f_position", ".0e"),
    "b_res": ("b_position", ".0e"),
    "in f": ("inside_f", ".0%"),
    "MiB": ("peak_mib", ".0f"),
    "error": ("gradient_error", ".0e"),
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown, aligned, in less than 120 columns."""
    lines = [["method", *COLUMNS]]
    for name, row in rows.items():
        cells = [format(row[key], form) if key in row else "" for key, form in COLUMNS.values()]
        lines.append([name.replace("anderson", "and.").replace("broyden", "broy."), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "|" + "|".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) + "|"
        for line in lines
    )


def plot(rows: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Time, divided into its parts, peak memory, and the error of the gradient, side by side."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows)[::-1]
    figure, (time_axis, memory_axis, error_axis) = pyplot.subplots(
        1, 3, figsize=(13, 0.4 * len(rows) + 1.4), layout="constrained", sharey=True, width_ratios=(2, 1, 1)
    )
    left = [0.0] * len(names)
    rest = {n: rows[n]["step_ms"] - rows[n]["f_ms"] - rows[n]["b_ms"] for n in names}
    for label, values in (
        ("forward solve", [rows[n]["f_ms"] for n in names]),
        ("backward solve", [rows[n]["b_ms"] for n in names]),
        ("the rest of the step", [rest[n] for n in names]),
    ):
        time_axis.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values)]
    time_axis.set_xlabel("ms per step")
    time_axis.legend()
    memory_axis.barh(names, [rows[n]["peak_mib"] for n in names], color="tab:gray")
    memory_axis.set_xlabel("peak memory of a step, MiB")
    error_axis.barh(names, [rows[n]["gradient_error"] for n in names], color="tab:red")
    error_axis.set_xscale("log")
    error_axis.set_xlabel("relative error of the gradient")
    figure.suptitle(title, fontsize="medium")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
