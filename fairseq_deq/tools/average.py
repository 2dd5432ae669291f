"""Average the weights of several checkpoints of one training into one.

    fairseq-deq-average checkpoints/checkpoint8.pt checkpoints/checkpoint9.pt --out averaged.pt
    fairseq-deq-average checkpoints --last 5 --out averaged.pt

From a folder the last `--last` checkpoints of epochs (checkpointN.pt) are taken, or, if it has none, of
updates (checkpoint_E_N.pt). The result is the newest checkpoint with the mean of all weights, taken in
float64, and without the state of the optimizer: evaluate it, sample from it, or train on from it with
fairseq-train --finetune-from-model. The checkpoints are read as data and left as they are.

What a model has learned about its solves (the preconditioner and the start) is that of the newest checkpoint:
the factors of a preconditioner have no mean, and the newest ones fit the mean of the weights nearly as well.
They decide how many evaluations a solve takes, but do not change its result.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_file import read_checkpoint
from ..errors import OptionError
from .command import command_line, describe, progress, written_whole

PROGRAM = "fairseq-deq-average"

# The name of what a model has learned about its solves, within those of its weights.
_LEARNED = ".knowledge."
# What a training that goes on from the result needs of the extra state; a memory of equilibria is left out.
_KEPT = ("train_iterator", "val_loss", "best", "previous_training_time", "metrics")
_EPOCHS, _UPDATES = re.compile(r"checkpoint(\d+)\.pt"), re.compile(r"checkpoint_\d+_(\d+)\.pt")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the checkpoints that folders stand for as `paths`.

    Raises:
        OptionError: one is wrong, or a folder has too few checkpoints.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="CHECKPOINT", help="checkpoint files, or one folder of them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument(
        "--last",
        type=int,
        default=5,
        metavar="N",
        help="how many checkpoints of a folder to average (default: 5)",
    )
    args = parser.parse_args(argv)
    if args.last < 1:
        raise OptionError(f"--last must be at least 1, got {args.last}")
    if args.out.exists():
        raise OptionError(f"--out {args.out} already exists; give the name of a new file")
    return args


def checkpoints_of(inputs: Sequence[Path], last: int) -> list[Path]:
    """The checkpoints that the inputs stand for, in their order.

    Args:
        inputs: files, and folders.
        last: how many of a folder, the newest ones.
    Raises:
        OptionError: an input does not exist, or a folder has fewer.
    """
    paths: list[Path] = []
    for given in inputs:
        if not given.exists():
            raise OptionError(f"there is no checkpoint {given}")
        if given.is_file():
            paths.append(given)
            continue
        for pattern in (_EPOCHS, _UPDATES):
            numbered = [(int(m[1]), path) for path in given.iterdir() if (m := pattern.fullmatch(path.name))]
            if numbered:
                break
        if len(numbered) < last:
            raise OptionError(
                f"--last {last}: the folder {given} has {len(numbered)} checkpoints with a number, like "
                "checkpoint9.pt or checkpoint_1_900.pt; fairseq-train leaves them without "
                "--no-epoch-checkpoints, or with --save-interval-updates"
            )
        paths += [path for _, path in sorted(numbered)[-last:]]
    return paths


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """The newest of some checkpoints with the mean of their weights.

    Args:
        paths: at least one checkpoint.
    Returns:
        what `torch.save` writes.
    Raises:
        OptionError: one is no checkpoint, or is of another model or dictionary than the first.
    """
    sums: dict[str, Tensor] = {}
    newest: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for path in progress(paths, "checkpoints"):
        state = read_checkpoint(path)
        first = first or {"shapes": _shapes(state["model"]), "task": state.get("task_state")}
        _require_same_model(first, state, paths[0], path)
        for name, tensor in state["model"].items():
            if tensor.is_floating_point() and _LEARNED not in name:
                sums[name] = sums[name] + tensor.double() if name in sums else tensor.double()
        if not newest or _updates(state) >= _updates(newest):
            newest = state
    for name, total in sums.items():
        newest["model"][name] = (total / len(paths)).to(newest["model"][name].dtype)
    newest["last_optimizer_state"] = None
    extra = newest.get("extra_state") or {}
    newest["extra_state"] = {name: extra[name] for name in _KEPT if name in extra}
    return newest


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items() if _LEARNED not in name}


def _updates(state: Mapping[str, Any]) -> int:
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def _require_same_model(first: dict[str, Any], state: dict[str, Any], one: Path, other: Path) -> None:
    shapes, others = first["shapes"], _shapes(state["model"])
    different = [n for n in (*shapes, *others) if shapes.get(n) != others.get(n)]
    if different:
        name = different[0]
        sizes = " and ".join(str(known.get(name, "not there")) for known in (shapes, others))
        raise OptionError(f"{one} and {other} are of different models: {name} is {sizes}")
    if first["task"] != state.get("task_state"):
        raise OptionError(f"{one} and {other} were trained with different dictionaries")


def run(argv: Sequence[str] | None = None) -> None:
    """Average, write, and say what was averaged.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option or a checkpoint cannot be used.
    """
    args = parse(argv)
    paths = checkpoints_of(args.inputs, args.last)
    state = average(paths)
    with written_whole(args.out) as partial:
        torch.save(state, partial)
        read_checkpoint(partial)  # a mean of finite numbers, written whole
    print(f"{args.out}: the mean of {', '.join(map(str, paths))}")


main = command_line(PROGRAM, run)
