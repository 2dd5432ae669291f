"""Checkpoints of fairseq, read as data: nothing in the file is called or evaluated, and damage is noticed."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch

from .errors import OptionError
from .zip_file import find_damage

CONVERT = "fairseq-deq-convert"

# What a run wrote to or met at. Nobody reads these from a file, and their addresses are left out.
_PLACES_OF_THE_RUN = ("distributed_init_method", "save_dir", "restore_file", "finetune_from_model")

# fairseq's adaptive modules save a buffer that they never set.
_UNSET = "_float_tensor"


def read_checkpoint(file: str | os.PathLike[str] | BinaryIO, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Tensors, numbers, strings and containers are made, and `argparse.Namespace`, in which fairseq keeps the
    options of components without a dataclass; whatever else a file names is refused before it is made.

    Args:
        file: its path, or the file opened for reading bytes.
        map_location: where the tensors go, as for `torch.load`.
    Returns:
        what the file holds; the addresses that the run met at are left out of its options.
    Raises:
        OptionError: it is no checkpoint of fairseq, is damaged, or holds more than data; the sentence says
            what it is.
        OSError: it cannot be opened.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return read_checkpoint(opened, map_location)
    path = getattr(file, "name", "the file")
    check_file(file, path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise OptionError(_what_was_refused(path, error)) from error
    except Exception as error:  # a file of another kind can fail in any way
        raise OptionError(
            f"{path} is not a whole fairseq checkpoint ({_first_line(error)}); go on from another one with "
            "--restore-file, or evaluate another one with --path"
        ) from error
    _check_contents(state, path)
    _check_options(state, path)
    _check_weights(state["model"], path)
    return state


def read_checkpoint_at(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`read_checkpoint` of a path that somebody typed.

    Raises:
        OptionError: there is no such file; and as for `read_checkpoint`.
    """
    if not os.path.isfile(path):
        raise OptionError(f"there is no checkpoint {path}")
    return read_checkpoint(path)


def options_in(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The options of the `model`, the `task` and so on in a checkpoint; of old ones all options together."""
    section = (state.get("cfg") or {}).get(name)
    if section is None:
        section = state.get("args") or {}
    return section if isinstance(section, Mapping) else vars(section)


def check_file(file: BinaryIO, path: Any) -> None:
    """Refuse a file that is something else than a checkpoint, or damaged.

    Every byte is read once and compared with the checksums in the file; that takes a second for a gigabyte.

    Args:
        file: opened for reading bytes; it is left at its beginning.
        path: its name, for the sentence.
    Raises:
        OptionError: the sentence says what the file is.
    """
    found = what_is_wrong(file)
    if found is not None and found.startswith("damaged"):
        raise OptionError(
            f"{path} is not a whole fairseq checkpoint: it is {found}; go on from another one with "
            "--restore-file, or evaluate another one with --path"
        )
    if found is not None:
        raise OptionError(f"{path} is not a whole fairseq checkpoint: it is {found}")


def what_is_wrong(file: BinaryIO) -> str | None:
    """What a file is in the place of something that torch saved, or how it is damaged; None: nothing.

    Args:
        file: opened for reading bytes; it is left at its beginning.
    Returns:
        what goes on a sentence of "it is".
    """
    start = file.read(512)
    file.seek(0)
    found = _kind(start)
    if found is not None or start[:2] != b"PK":  # before version 1.6 torch wrote no zip, with no checksums
        return found
    damage = find_damage(file)
    file.seek(0)
    return None if damage is None else f"damaged ({damage}: a copy or a disk may have done it)"


def _kind(start: bytes) -> str | None:
    text = start.lstrip().lower()
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, which stands for the file (git lfs pull gets it)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if start[8:10] == b'{"':
        return "a file of safetensors"
    if start[:2] == b"\x1f\x8b":
        return "an archive that is still compressed"
    return None


def _check_contents(state: Any, path: Any) -> None:
    if not isinstance(state, dict):
        raise OptionError(f"{path} is not a whole fairseq checkpoint: it holds a {type(state).__name__}")
    missing = None
    if not isinstance(state.get("model"), Mapping) or not state["model"]:
        missing = "weights of a model ('model')"
    elif not isinstance(state.get("cfg"), Mapping) and not isinstance(state.get("args"), argparse.Namespace):
        missing = "options ('cfg', or 'args')"
    if missing is not None:
        names = ", ".join(sorted(str(key) for key in state)[:8]) or "nothing"
        raise OptionError(
            f"{path} is not a whole fairseq checkpoint: it has no {missing}, only {names}; use the "
            "file that fairseq-train saved"
        )
    if not all(isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state["model"].items()):
        raise OptionError(f"{path} is not a whole fairseq checkpoint: its model is more than named tensors")


def _check_options(state: dict[str, Any], path: Any) -> None:
    """Refuse what would be looked up elsewhere: interpolations and addresses."""
    for root in ("cfg", "args"):
        for holder, name, value in _strings(state.get(root)):
            if name in _PLACES_OF_THE_RUN and "${" not in value:
                if "://" in value:
                    holder[name] = None
                continue
            for mark, meaning in (("${", "an interpolation"), ("://", "an address")):
                if mark in value or mark in str(name):
                    raise OptionError(
                        f"{path} has {meaning} among its options ({name}: {value[:80]!r}), which would be "
                        "looked up where it is loaded; a checkpoint may hold values only"
                    )


def _strings(root: Any) -> Iterator[tuple[Any, Any, str]]:
    """Each string in nested containers, with what holds it and its name there."""
    waiting, seen = [root], set()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        holder = vars(holder) if isinstance(holder, argparse.Namespace) else holder
        if isinstance(holder, Mapping):
            pairs = list(holder.items())
        elif isinstance(holder, (list, tuple, set)):
            pairs = list(enumerate(holder))
        else:
            continue
        for name, value in pairs:
            if isinstance(value, str):
                yield holder, name, value
            else:
                waiting.append(value)


def _check_weights(weights: Mapping[str, torch.Tensor], path: Any) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not name.endswith(_UNSET):
            failed = ~torch.isfinite(tensor)
            if bool(failed.any()):
                raise OptionError(
                    f"{path} holds NaN or infinity in its weights ({name}, {int(failed.sum())} of "
                    f"{tensor.numel()} numbers): the training had diverged; use an earlier checkpoint"
                )


def _what_was_refused(path: Any, error: Exception) -> str:
    _, _, named = str(error).partition("GLOBAL ")
    name = named.split()[0] if named else ""
    if not name:
        return f"{path} is not a whole fairseq checkpoint ({_first_line(error)}); take another one"
    return (
        f"{path} holds more than data ({name}), and is not loaded; if you trust who made it, "
        f"{CONVERT} {path} NEW.pt says what it needs and writes a checkpoint of data alone"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")[:120]
