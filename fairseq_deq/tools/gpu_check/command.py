"""Parts of scripts/gpu_check.sh: training steps at true size, what a machine can do, loss curves, one report.

    python -m fairseq_deq.tools gpu-check steps 700 512     # of random layers of these widths
    python -m fairseq_deq.tools gpu-check warm              # compiles what solves run on the device
    python -m fairseq_deq.tools gpu-check machine           # rates of products
    python -m fairseq_deq.tools gpu-check curves LOG...     # of fairseq-train with --log-format json
    python -m fairseq_deq.tools gpu-check merge             # all parts as OUT/gpu_check.json

Every part is a file in the folder PARTS that is written after each entry; entries that are there are not
measured again. DEVICE=cpu rehearses it at toy sizes.
A step is the forward solve, the backward solve and the gradients of the layer's parameters, after a memory of
as many positions; embeddings, softmax and optimizer are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import OptionError
from ...solvers import active, record
from ..command import command_line, describe
from ..plot.runs import read_json_log
from .steps import SIZES, RandomLayer, our_step, step_entry, steps
from .visit import CUDA, DEVICE, OUT, PARTS, Part, milliseconds, precision

PROGRAM = "gpu-check"
_COLUMNS = ("loss", "f_nfe", "f_conv", "b_conv", "step_time")


def warm() -> None:
    """Compile the rules once, so that later processes find them in torch's cache."""
    layer = RandomLayer("512")
    entry = step_entry(layer, "tf32", lambda facts: our_step(layer, facts), compiled=True)
    Part("warm").put("compiling", entry)
    print(entry)


def machine() -> None:
    """Versions, and the rates of products and copies."""
    part = Part("machine")
    part.put("versions", {"torch": torch.__version__, "python": sys.version.split()[0]})
    if CUDA:
        about = torch.cuda.get_device_properties(0)
        part.put("device", {"name": about.name, "MiB": about.total_memory // 2**20})
    n = 4096 if CUDA else 64
    for kind in ("fp32", "tf32"):
        with precision(kind):
            a = torch.randn(n, n, device=DEVICE)
            part.put(f"TFLOP/s {kind}", 2e-9 * n**3 / milliseconds(lambda: a @ a, 6))  # noqa: B023
    print(part.found)


def curves(logs: Sequence[str]) -> None:
    """Loss by update of trainings."""
    part = Part("curves")
    for log in map(Path, logs):
        try:
            train = read_json_log(log, log.stem).train
        except OptionError as error:
            print(error)
            continue
        rows = [
            {"num_updates": n, **{name: train[name][n] for name in _COLUMNS if n in train[name]}}
            for n in sorted(train["loss"])
        ]
        part.put(log.stem, rows)
        shown = rows[:: max(1, len(rows) // 6)] + rows[-1:]
        print(log.stem, " ".join(f"{row['num_updates']:.0f}:{row['loss']:.3f}" for row in shown))
        if rows:
            print("   last:", rows[-1])


def merge() -> None:
    """One file of all parts."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(PARTS.glob("*.json"))}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gpu_check.json").write_text(json.dumps(parts, indent=1))


def _run(argv: Sequence[str] | None) -> None:
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("part", choices=("steps", "warm", "machine", "curves", "merge"))
    parser.add_argument("arguments", nargs="*", help="widths of steps, logs of curves")
    args = parser.parse_args(argv)
    if not CUDA:
        record.books_on_host = active.books_on_host = lambda device: False  # as on a device
    if args.part == "steps":
        for size in args.arguments:
            if size not in SIZES:
                raise OptionError(
                    f"{size} is not a size that can be measured; choose from {', '.join(SIZES)}"
                )
            steps(size)
    elif args.part == "curves":
        curves(args.arguments)
    else:
        {"warm": warm, "machine": machine, "merge": merge}[args.part]()


main = command_line(PROGRAM, _run)
