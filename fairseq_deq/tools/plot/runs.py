#!/usr/bin/env python3
"""Draw the course of one or several fairseq-train runs into a PNG.

A RUN is what fairseq-train wrote: a log file in JSON (--log-format json --log-file FILE), or a folder of
TensorBoard events (--tensorboard-logdir DIR). NAME=RUN gives it a name in the legend.

Drawn, as far as a run has it: perplexity and loss of training and validation, evaluations of f in the forward
and the backward solve (per solve, and per position where frozen positions are left out), residuals reached,
share of positions that converged, step time, spectral radius, Jacobian penalty, learning rate and norm of the
gradient. Training is a solid line, validation a line with dots.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Curve = dict[int, float]  # value by number of updates


class InputError(Exception):
    """What is wrong with the input, in one sentence for the person who gave it."""


@dataclass(frozen=True)
class Panel:
    """One picture of the figure.

    Args:
        title: above the picture.
        columns: the columns of the log that are drawn in it, with what the legend calls them.
        log_scale: whether the vertical axis is logarithmic.
    """

    title: str
    columns: dict[str, str]
    log_scale: bool = False


PANELS = (
    Panel("perplexity", {"ppl": ""}, log_scale=True),
    Panel("loss (bits per token)", {"loss": ""}),
    Panel(
        "evaluations of f",
        {
            "f_nfe": "forward",
            "b_nfe": "backward",
            "f_lane_nfe": "forward, per position",
            "b_lane_nfe": "backward, per position",
        },
    ),
    Panel("residual", {"f_res": "forward", "b_res": "backward"}, log_scale=True),
    Panel("converged share", {"f_conv": "forward", "b_conv": "backward"}),
    Panel("seconds per update", {"step_time": ""}),
    Panel("spectral radius", {"sradius": ""}),
    Panel("Jacobian penalty", {"jac": ""}, log_scale=True),
    Panel("learning rate", {"lr": ""}),
    Panel("norm of the gradient", {"gnorm": ""}, log_scale=True),
)
COLUMNS = tuple(column for panel in PANELS for column in panel.columns)
# Of these alone a figure would not be a picture of a training run.
ESSENTIAL = (
    "loss",
    "ppl",
    "f_nfe",
    "b_nfe",
    "f_res",
    "b_res",
    "f_conv",
    "b_conv",
    "f_lane_nfe",
    "b_lane_nfe",
)


@dataclass
class Run:
    """The curves of a training run.

    Args:
        name: for the legend.
        train: curves of training, by column.
        valid: curves of validation, by column.
    """

    name: str
    train: dict[str, Curve] = field(default_factory=lambda: defaultdict(dict))
    valid: dict[str, Curve] = field(default_factory=lambda: defaultdict(dict))

    def add(self, part: str, update: int, column: str, value: float) -> None:
        """Add a point; a later one replaces an earlier one, as a resumed run repeats updates.

        Args:
            part: "train" or "valid".
            update: number of updates done.
            column: name in the log. From `ups` (updates per second) the step time is taken.
            value: the value; what is not finite is not drawn.
        """
        if column == "ups" and value > 0:
            column, value = "step_time", 1 / value
        if column in COLUMNS and math.isfinite(value):
            (self.train if part == "train" else self.valid)[column][update] = value


def read_json_log(path: Path, name: str) -> Run:
    """Read a log file of fairseq-train --log-format json.

    Args:
        path: the file.
        name: for the legend.

    Returns:
        The run. Lines that are not JSON objects (fairseq writes its configuration and messages among
        them, and a kill leaves half a line) are passed over.

    Raises:
        InputError: the file cannot be read, or holds no line of progress.
    """
    run, epochs = Run(name), Run(name)
    found = False
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"The log {path} cannot be read: {error.strerror}.") from None
    for line in text.split("\n"):
        # The console's lines have the time and the place in the code before the object.
        start = line.find('{"epoch"')
        if start < 0:
            continue
        try:
            stats = json.loads(line[start:])
        except ValueError:
            continue
        found = True
        for key, shown in stats.items():
            try:
                value = float(shown)
            except (TypeError, ValueError):
                continue
            # train_inner lines have bare names, those at the end of an epoch `train_` and `valid_`.
            prefix = next((prefix for prefix in ("train_", "valid_") if f"{prefix}num_updates" in stats), "")
            update = int(float(stats.get(f"{prefix}num_updates", 0)))
            column = key.removeprefix(prefix)
            if prefix == "valid_":
                run.add("valid", update, column, value)
            else:
                (epochs if prefix else run).add("train", update, column, value)
    if not found:
        raise InputError(
            f"The file {path} has no line of progress; fairseq-train writes them with "
            f"--log-format json --log-file FILE."
        )
    run.train = run.train or epochs.train
    return run


def read_events(path: Path) -> Iterator[tuple[float, int, str, float]]:
    """Read the scalars of a TensorBoard event file.

    Args:
        path: the file: records of length (8 bytes), its checksum (4), an event, and its checksum (4).

    Yields:
        Wall time, number of updates, tag and value. A record cut short by a kill, or spoilt, ends the file.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        start = position + 12
        if start + length > len(data):
            return
        try:
            event = Event.FromString(data[start : start + length])
        except DecodeError:
            return
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                yield event.wall_time, event.step, value.tag, value.simple_value
        position = start + length + 4


def read_tensorboard(path: Path, name: str) -> Run:
    """Read a folder of fairseq-train --tensorboard-logdir.

    Args:
        path: the folder; fairseq writes into its folders `train_inner` (progress), `train` (ends of epochs)
            and one for each validation text.
        name: for the legend.

    Returns:
        The run.

    Raises:
        InputError: there is no event file in it.
    """
    files = sorted(path.rglob("events.out.tfevents.*"))
    if not files:
        raise InputError(
            f"The folder {path} has no TensorBoard events; fairseq-train writes them with "
            f"--tensorboard-logdir DIR."
        )
    try:
        points = sorted(
            (wall, file.parent.name, step, tag, value)
            for file in files
            for wall, step, tag, value in read_events(file)
        )
    except ImportError:
        raise InputError(
            "TensorBoard events are read with tensorboardX, which is not installed; "
            "type: pip install tensorboardX"
        ) from None
    run, epochs = Run(name), Run(name)
    for _, folder, step, tag, value in points:
        if folder in ("train", "train_inner"):
            (run if folder == "train_inner" else epochs).add("train", step, tag, value)
        else:
            run.add("valid", step, tag, value)
    run.train = run.train or epochs.train
    return run


def read_run(argument: str) -> Run:
    """Read what a RUN on the command line stands for.

    Args:
        argument: a path, or NAME=path.

    Returns:
        The run.

    Raises:
        InputError: it does not exist, or has none of the columns that are drawn.
    """
    name, equals, given = argument.partition("=")
    if not equals or Path(argument).exists():
        name, given = "", argument
    path = Path(given)
    if path.is_dir():
        run = read_tensorboard(path, name or path.resolve().name)
    elif path.exists():
        run = read_json_log(path, name or path.stem)
    else:
        raise InputError(f"The run {path} does not exist.")
    if not any(column in part for part in (run.train, run.valid) for column in ESSENTIAL):
        raise InputError(f"The run {path} has none of the columns {', '.join(ESSENTIAL)}.")
    return run


def draw(runs: Sequence[Run], out: Path, title: str = "") -> list[str]:
    """Draw runs into a PNG.

    Args:
        runs: the runs, overlaid.
        out: the picture, written under another name first, so that a kill leaves no half picture.
        title: above the figure.

    Returns:
        The titles of the panels that had something to show.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = [
        panel
        for panel in PANELS
        if any(column in part for run in runs for part in (run.train, run.valid) for column in panel.columns)
    ]
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.4 * down), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels):
        values = []
        for number, run in enumerate(runs):
            for style, (column, detail) in zip(("-", "--", ":", "-."), panel.columns.items()):
                label = ", ".join(text for text in (run.name if len(runs) > 1 else "", detail) if text)
                # One colour a run where several are compared, one a column where there is one run.
                colour = f"C{number}" if len(runs) > 1 else f"C{list(panel.columns).index(column)}"
                for part, curves, dots in (("", run.train, None), ("validation", run.valid, "o")):
                    if column not in curves:
                        continue
                    updates = sorted(curves[column])
                    points = [curves[column][update] for update in updates]
                    values += points
                    axis.plot(
                        updates,
                        points,
                        linestyle=style,
                        marker=dots or ("." if len(points) == 1 else None),
                        markersize=4,
                        color="C1" if dots and len(runs) == len(panel.columns) == 1 else colour,
                        linewidth=1.2,
                        label=", ".join(text for text in (label, part) if text) or "training",
                    )
        if panel.log_scale and min(values) > 0:
            axis.set_yscale("log")
            # Perplexities and the like read better as 500 than as 5 x 10^2; residuals do not.
            if min(values) >= 1 and max(values) < 1e5:
                axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
                axis.yaxis.set_minor_formatter(ticker.LogFormatter(labelOnlyBase=False))
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(True, alpha=0.3, which="both")
        axis.legend(fontsize=7)
    if title:
        figure.suptitle(title)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)
    os.replace(partial, out)
    return [panel.title for panel in panels]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit status: 0, or 1 after one sentence that says what is wrong.
    """
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="plot_training.py",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="JSON log or TensorBoard folder, or NAME=RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--title", default="", help="title of the figure")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix.lower() != ".png":
            raise InputError(f"--out {args.out}: the picture is a PNG, so its name must end in .png.")
        if args.out.is_dir():
            raise InputError(f"--out {args.out} is a folder; it must be a file.")
        panels = draw([read_run(argument) for argument in args.runs], args.out, args.title)
    except InputError as error:
        print(f"plot_training.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"plot_training.py: {args.out} cannot be written: {error}.", file=sys.stderr)
        return 1
    print(f"{args.out}: {', '.join(panels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
