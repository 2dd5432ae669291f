"""Rewrite a checkpoint whose loading would run code as one that holds only data.

    fairseq-deq-convert OLD.pt NEW.pt                         # says what loading OLD would call
    fairseq-deq-convert OLD.pt NEW.pt --i-trust-its-author    # calls it, and writes NEW

Checkpoints of older fairseq hold numpy numbers, objects of omegaconf or classes of their own, and loading
such a file can run any code that its author put there. Without `--i-trust-its-author` nothing is loaded: the
names of what the file would call are printed. With it the file is loaded once, that code runs, and what comes
out is written to NEW.pt as tensors, numbers, strings and containers, which every tool reads without calling
anything. The options of the tokeniser and BPE are left out: give them when you load the checkpoint.
"""

from __future__ import annotations

import argparse
import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint_file import CONVERT as PROGRAM
from ..checkpoint_file import check_file, read_checkpoint
from ..errors import OptionError
from .command import command_line, describe, written_whole

_FOR_TEXT = ("bpe", "tokenizer")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("old", metavar="OLD", help="the checkpoint, which is not changed")
    parser.add_argument("new", metavar="NEW", help="the file to write")
    parser.add_argument(
        "--i-trust-its-author",
        action="store_true",
        help="load OLD and write NEW; this runs any code that OLD contains",
    )
    return parser.parse_args(argv)


def _run(argv: Sequence[str] | None) -> None:
    args = parse(argv)
    convert(args.old, args.new, args.i_trust_its_author)


def convert(old: str, new: str, trusted: bool) -> None:
    """Write `old` to `new`, as data that no loading can run.

    Args:
        old: a checkpoint.
        new: a file that is not there yet.
        trusted: whether what the file calls may run.
    Raises:
        OptionError: the file calls something and is not trusted, is no checkpoint, or `new` is there.
    """
    if not os.path.isfile(old):
        raise OptionError(f"there is no checkpoint {old}")
    if os.path.exists(new):
        raise OptionError(f"{new} already exists; give the name of a new file")
    with open(old, "rb") as file:
        check_file(file, old)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(old)
    called = sorted({name for name in named if name != "argparse.Namespace"})
    print(f"{old} calls: {', '.join(called) or 'nothing'}")
    if called and not trusted:
        raise OptionError(
            f"loading {old} runs what it calls; where you trust who made it, add --i-trust-its-author"
        )
    state = plain(torch.load(old, map_location="cpu", weights_only=False))
    cfg = state.get("cfg") if isinstance(state, dict) else None
    for name in _FOR_TEXT:
        if isinstance(cfg, dict) and cfg.get(name) is not None:
            cfg[name] = None
            print(f"left out: the options of {name}")
    with written_whole(Path(new)) as unfinished:
        torch.save(state, unfinished)
        read_checkpoint(unfinished)
    print(f"{new} holds data alone")


def plain(value: Any) -> Any:
    """The same as tensors, numbers, strings and containers.

    Args:
        value: what a checkpoint held.
    Returns:
        what `read_checkpoint` reads.
    Raises:
        OptionError: there is an object that none of these can represent.
    """
    if isinstance(value, np.generic):  # some are numbers of Python too
        return value.item()
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value.copy())
    if type(value).__module__.partition(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        return plain(OmegaConf.to_container(value, resolve=False, enum_to_str=True))
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**{name: plain(item) for name, item in vars(value).items()})
    if isinstance(value, Mapping):
        return {plain(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        kind = type(value) if type(value) in (list, tuple, set) else list
        return kind([plain(item) for item in value])
    raise OptionError(
        f"the checkpoint holds a {type(value).__module__}.{type(value).__qualname__}, which no tensor, "
        "number, string or container can represent"
    )


main = command_line(PROGRAM, _run)
