"""Measure time, memory and accuracy of a training step, with this package, TorchDEQ and stacks of layers.

    fairseq-deq-benchmark data-bin/wikitext-2 --path checkpoint_last.pt --tokens 64 --out benchmark
    fairseq-deq-benchmark quickstart/bin --path quickstart/checkpoints/checkpoint_last.pt --batch 4 \\
        --rounds 2 --only anderson+ift --only "stack of 12"

One step is the forward solve, one evaluation of f with its graph, the backward solve and the gradients of
the layer's parameters; softmax and optimizer are left out, and so is dropout. Every method has the same f,
weights, text, memory, tolerance and budgets. The methods take turns, so that a busy machine slows all of them
alike: times are medians, ratios medians of the ratios within a turn. TorchDEQ's rows need
`pip install --no-deps torchdeq`. "no preconditioner" and "no start" are our default without the learned
preconditioner and without the learned start. "no order" is our default without the rule that a position is
final as soon as it and all positions before it have converged.
OUT.json and OUT.png are written beside the table that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import OptionError
from ..command import add_user_dir, command_line, describe, import_user_dir, written_whole
from .layer import load_layer
from .measure import measure, true_gradients
from .output import plot, table

PROGRAM = "fairseq-deq-benchmark"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    add_user_dir(parser)
    parser.add_argument("--path", required=True, help="checkpoint of a DEQ language model")
    parser.add_argument("--split", default="valid", help="split of the data to read (default: valid)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per row (default: 64)")
    parser.add_argument("--memory", type=int, help="positions of memory before them (default: as --tokens)")
    parser.add_argument("--batch", type=int, default=16, help="rows per batch (default: 16)")
    parser.add_argument("--rtol", type=float, default=1e-3, help="relative tolerance of both solves")
    parser.add_argument(
        "--lane-factor",
        type=float,
        default=1.5,
        help="also measure our default with the tolerance of a position looser by this factor, so that "
        "whole samples meet --rtol",
    )
    parser.add_argument("--f-thres", type=int, default=60, help="largest number of evaluations of f")
    parser.add_argument("--b-thres", type=int, default=60, help="largest number of vector-Jacobian products")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--threads", type=int, default=0, help="number of threads; 0: torch's default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--only", action="append", help="name of a row to measure (default: all rows); may be repeated"
    )
    parser.add_argument("--reference", default="torchdeq broyden+ift", help="the row to which ratios refer")
    parser.add_argument("--out", default="benchmark", help="where to write OUT.json and OUT.png")
    args = parser.parse_args(argv)
    args.memory = args.tokens if args.memory is None else args.memory
    for name in ("tokens", "batch", "f_thres", "b_thres", "rounds"):
        if getattr(args, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def run(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option, the checkpoint or the text cannot be used.
    """
    args = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler measures memory, and need not say so
    if args.threads:
        torch.set_num_threads(args.threads)
    import_user_dir(args)
    layer, exact = load_layer(args)
    truth = true_gradients(layer, exact)
    rows = measure(args, layer, truth)
    title = (
        f"{Path(args.path).parent.name}: {args.batch} x {args.tokens} tokens, memory {args.memory}, "
        f"tolerance {args.rtol:g}, {args.device}, {torch.get_num_threads()} threads"
    )
    print(
        f"{title}; ratios to {args.reference!r}; lane: evaluations computed per position; res: relative "
        f"residual of the worst position; error: of the gradient\n\n{table(rows)}"
    )
    out = Path(args.out)
    with written_whole(out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=1) + "\n")
    plot(rows, title, out.with_suffix(".png"))
    print(f"{out.with_suffix('.json')} and {out.with_suffix('.png')} written")


main = command_line(PROGRAM, run)
