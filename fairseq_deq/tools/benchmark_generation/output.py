"""The rates of the contenders as a table and as a picture."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..command import written_whole
from .decoding import Rate


def summary(length: int, batch: int, beam: int, rates: dict[str, Rate]) -> dict[str, Any]:
    """Rates and ratios of one setting."""
    rows = batch * beam
    entry: dict[str, Any] = {"context": length, "batch": batch, "beam": beam}
    for name, rate in rates.items():
        if rate.seconds:
            median = statistics.median(rate.seconds)
            entry[name] = {"tokens_per_second": rows / median, **asdict(rate)}
    ours, stack = rates["ours"], rates["stack"]
    for name, times in (("speed", "seconds"), ("cpu_speed", "cpu_seconds")):
        turns = zip(getattr(ours, times), getattr(stack, times))
        entry[f"{name}_over_stack"] = statistics.median(theirs / own for own, theirs in turns)
    entry["cache_under_stack"] = stack.cache_bytes / ours.cache_bytes
    return entry


HEADER = (
    "context batch beam | ours tok/s  no cache  layers |  ratio    cpu | evals  computed  needed | "
    "cache B/token  layers"
)


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    ours, stack, uncached = entry["ours"], entry["stack"], entry.get("uncached")
    slow = f"{uncached['tokens_per_second']:9.2f}" if uncached else "        -"
    cells = (
        f"{entry['context']:7d} {entry['batch']:5d} {entry['beam']:4d}",
        f"{ours['tokens_per_second']:10.1f} {slow} {stack['tokens_per_second']:7.1f}",
        f"{entry['speed_over_stack']:6.2f} {entry['cpu_speed_over_stack']:6.2f}",
        f"{ours['evaluations']:5.1f} {ours['own_evaluations']:9.1f} {ours['needed_evaluations']:7.1f}",
        f"{ours['cache_bytes']:13.0f} {stack['cache_bytes']:7.0f}",
    )
    return " | ".join(cells)


def plot(results: list[dict[str, Any]], layers: int, path: Path) -> None:
    """Tokens per second against the context, a panel for each batch and beam."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r["batch"], r["beam"]) for r in results})
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3.5), squeeze=False, layout="constrained"
    )
    labels = {
        "ours": "cached equilibria",
        "stack": f"transformer_lm, {layers} layers",
        "uncached": "without cache",
    }
    for axis, (batch, beam) in zip(axes[0], panels):
        chosen = [r for r in results if (r["batch"], r["beam"]) == (batch, beam)]
        for name, label in labels.items():
            points = [(r["context"], r[name]["tokens_per_second"]) for r in chosen if name in r]
            if points:
                axis.plot(*zip(*points), marker="o", label=label)
        axis.set(title=f"batch {batch}, beam {beam}", xlabel="context", xscale="log", yscale="log")
    axes[0][0].set_ylabel("tokens per second")
    handles = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles), fontsize=8)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
