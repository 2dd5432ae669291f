"""Draw the loss and the solves of one or several fairseq-train runs as a PNG picture.

    fairseq-deq-plot quickstart/tensorboard
    fairseq-deq-plot deq=tensorboard/deq stack=tensorboard/stack --out compared.png --title "WikiText-2"
    fairseq-deq-plot train.log --json curves.json

A RUN is what fairseq-train wrote: a log file in JSON (--log-format json --log-file FILE), or a folder of
TensorBoard events (--tensorboard-logdir DIR). NAME=RUN gives it a name in the legend.

Drawn, as far as a run has it: perplexity and loss of training and validation, evaluations of f in the forward
and the backward solve (per solve, and per position where frozen positions are left out), residuals reached,
share of positions that converged, step time, spectral radius, Jacobian penalty, learning rate and norm of the
gradient. Lines mark the caps of the evaluations and the tolerances, as far as the log or the architecture
says them, and the update at which a pretrained stack became an equilibrium.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ...errors import OptionError
from ..command import command_line, describe, written_whole
from .picture import draw
from .runs import read_run

PROGRAM = "fairseq-deq-plot"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="JSON log or TensorBoard folder, or NAME=RUN")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("training.png"),
        metavar="PNG",
        help="the picture to write (default: training.png)",
    )
    parser.add_argument("--title", default="", help="title of the figure")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers of the curves to this file too"
    )
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise OptionError(f"--out {args.out}: the picture is a PNG, so its name must end in .png.")
    for name in ("out", "json"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise OptionError(f"--{name} {path} is a folder; it must be a file.")
    return args


def run(argv: Sequence[str] | None = None) -> None:
    """Read, draw and say what was drawn.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option or a run cannot be used.
    """
    args = parse(argv)
    runs = [read_run(argument) for argument in args.runs]
    panels = draw(runs, args.out, args.title)
    if args.json is not None:
        numbers = [
            {
                "name": run.name,
                "options": run.settings.values,
                "switch": run.switch,
                "train": {column: sorted(curve.items()) for column, curve in run.train.items()},
                "valid": {column: sorted(curve.items()) for column, curve in run.valid.items()},
            }
            for run in runs
        ]
        with written_whole(args.json) as partial:
            partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {', '.join(panels)}")


main = command_line(PROGRAM, run)
