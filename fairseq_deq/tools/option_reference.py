"""Write every option of this package, from the dataclasses that define them, as examples/options.md.

    python -m fairseq_deq.tools option-reference --out examples/options.md

A test compares examples/options.md with this output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from ..models.deq_config import DEQLanguageModelConfig
from ..options import flag, meaning, valid_values
from .command import command_line, describe, written_whole

PROGRAM = "option-reference"
PACKAGE = __package__.partition(".")[0]

_HEAD = """\
# Options

All options that this package adds to fairseq; in a yaml file write `_` for `-`. "Only with" names the options
without which an option has no effect; giving it then ends in an error or a warning. `f` is the layer, `z*`
its equilibrium, and an *evaluation* is one application of `f` ([README](../README.md)). This page is written
by `python -m fairseq_deq.tools option-reference --out examples/options.md`.
"""
# Registry, heading, and how a component of it is chosen.
_OTHERS: tuple[tuple[Mapping[str, type], str, str], ...] = (
    (TASK_DATACLASS_REGISTRY, "Tasks", "--task"),
    (CRITERION_DATACLASS_REGISTRY, "Criterion", "--criterion"),
    (OPTIMIZER_DATACLASS_REGISTRY, "Optimizer", "--optimizer"),
    (LR_SCHEDULER_DATACLASS_REGISTRY, "Learning rate", "--lr-scheduler"),
)


def page() -> str:
    """The reference, in Markdown."""
    parts = [_HEAD, "## Models\n"]
    models = _ours(MODEL_DATACLASS_REGISTRY)
    families = {
        name: options for name, options in models.items() if DEQLanguageModelConfig in options.__bases__
    }
    parts.append("### All models\n\n" + _table(DEQLanguageModelConfig, _own(DEQLanguageModelConfig)))
    for name, options in families.items():
        parts.append(f"### `--arch {name}`\n\n" + _table(options, _own(options)))
        sizes = {n: o for n, o in models.items() if issubclass(o, options) and o is not options}
        if sizes:
            parts.append(
                f"Named sizes of `{name}`, with the defaults that they change:\n\n" + _sizes(options, sizes)
            )
    for registry, heading, option in _OTHERS:
        parts.append(f"## {heading}\n")
        for name, options in _ours(registry).items():
            # What components share is in a dataclass of ours that is not a component itself.
            base = next(b for b in options.__mro__[1:] if not b.__module__.startswith(PACKAGE))
            beside = "" if base.__module__.startswith("fairseq.dataclass") else _beside(base)
            parts.append(f"### `{option} {name}`\n{beside}\n" + _table(options, _ours_of(options)))
    return "\n".join(parts)


def _ours(registry: Mapping[str, type]) -> dict[str, type]:
    return {name: options for name, options in registry.items() if options.__module__.startswith(PACKAGE)}


def _beside(base: type) -> str:
    return f"\nIt has those of fairseq's `{base.__name__.removesuffix('Config')}` too.\n"


def _own(options: type) -> Iterator[Field[Any]]:
    """The fields that a dataclass defines itself and that can be typed."""
    for one in fields(options):
        is_linked = isinstance(one.default, str) and one.default.startswith("${")
        if one.name in options.__annotations__ and meaning(options, one) and not is_linked:
            yield one


def _ours_of(options: type) -> Iterator[Field[Any]]:
    """The fields that a dataclass and its bases in this package define; those of the bases come last."""
    for owner in options.__mro__:
        if owner.__module__.startswith(PACKAGE):
            yield from _own(owner)


def _table(options: type, rows: Iterator[Field[Any]]) -> str:
    head = ["| option | default | valid | meaning |", "|---|---|---|---|"]
    lines = head[:]
    for one in rows:
        cells = (
            f"`{flag(one.name)}`",
            _shown(one.default),
            valid_values(options, one),
            meaning(options, one),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if lines == head:
        return "No options of its own.\n"
    return "\n".join(lines) + "\n"


def _sizes(family: type, sizes: Mapping[str, type]) -> str:
    lines = ["| `--arch` | defaults |", "|---|---|"]
    before = {one.name: one.default for one in fields(family)}
    for name, options in sizes.items():
        changed = [
            f"`{flag(one.name)} {_shown(one.default)}`"
            for one in fields(options)
            if one.default != before[one.name] and not one.name.startswith("_")
        ]
        lines.append(f"| `{name}` | {', '.join(changed)} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    default = getattr(default, "value", default)
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def _run(argv: Sequence[str] | None) -> None:
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: print)")
    args = parser.parse_args(argv)
    if args.out is None:
        print(page())
        return
    with written_whole(args.out) as partial:
        partial.write_text(page(), encoding="utf-8")


main = command_line(PROGRAM, _run)
