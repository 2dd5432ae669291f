"""Report on one page how the solves of a trained model go, and what other options would change.

    fairseq-deq-diagnose CHECKPOINT DATA --out report.html [--compare OTHER] [--json numbers.json]

reads the first tokens of a split of the data folder (`--gen-subset`, `--tokens`), or of raw text (`--input`,
with `--bpe` and `--tokenizer`; the dictionary still comes from DATA), measures the solves there, and writes
one self-contained HTML file. It begins with verdicts in plain sentences.
Exit status: 0 healthy, 1 something to look at, 2 could not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data.encoders import BPE_REGISTRY, TOKENIZER_REGISTRY
from tqdm import tqdm

from ...errors import OptionError
from ...literals import literal
from ..command import add_user_dir, command_line, describe, import_user_dir, written_whole
from .measure import STAGES, Measured, measure
from .page import refusal_page, report_page
from .subject import Subject, load, rows_not_finite
from .verdict import Verdict, exit_status
from .verdicts import judge

PROGRAM = "fairseq-deq-diagnose"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint of a DEQ language model")
    add("data", metavar="DATA", help="data folder that fairseq-preprocess wrote, with the dictionary")
    add("--out", required=True, type=Path, metavar="HTML", help="the page to write")
    add("--json", type=Path, metavar="FILE", help="write the numbers to this file too")
    add(
        "--compare", metavar="CHECKPOINT", help="another checkpoint with the same dictionary, to compare with"
    )
    add(
        "--gen-subset",
        default="valid",
        metavar="SPLIT",
        help="split of the data folder to read (default: valid)",
    )
    add("--input", metavar="TEXT", help="read this raw text instead; - for standard input")
    for name, registry in (("bpe", BPE_REGISTRY), ("tokenizer", TOKENIZER_REGISTRY)):
        add(f"--{name}", choices=sorted(registry), help="how the raw text is cut, as for fairseq-interactive")
    add("--sentencepiece-model", metavar="FILE")
    add("--bpe-codes", metavar="FILE")
    add("--moses-no-escape", action="store_true")
    add("--tokens", type=int, default=4096, metavar="N", help="tokens to read (default: 4096)")
    add(
        "--rows",
        type=int,
        default=8,
        metavar="N",
        help="number of rows that the tokens are cut into (default: 8)",
    )
    add(
        "--tokens-per-sample",
        type=int,
        default=0,
        metavar="N",
        help="length of a block (default: as in training)",
    )
    add("--model-overrides", default="{}", metavar="DICT", help="options of the model to change")
    add_user_dir(parser)
    args = parser.parse_args(argv)
    for name, low in (("tokens", 2), ("rows", 1), ("tokens_per_sample", 0)):
        if getattr(args, name) < low:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    for name in ("out", "json"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise OptionError(f"--{name} {path}: there is no folder {path.absolute().parent}")
    args.model_overrides = literal(args.model_overrides)
    if not isinstance(args.model_overrides, dict):
        raise OptionError("--model-overrides must be a dictionary, like \"{'f_thres': 120}\"")
    return args


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measure, and write the page.

    Args:
        args: the options.
    Returns:
        the exit status.
    Raises:
        OptionError: it could not be measured; where the checkpoint is why, the page says so too.
    """
    begin = time.perf_counter()
    import_user_dir(args)
    paths = [args.checkpoint] + ([args.compare] if args.compare else [])
    for path in paths:
        if not os.path.isfile(path):
            raise OptionError(f"there is no checkpoint {path}")
    found: list[tuple[Subject, Measured, list[Verdict]]] = []
    with tqdm(total=len(paths) * len(STAGES), bar_format="{percentage:3.0f}%|{bar}| {desc}") as bar:
        for path in paths:
            try:
                found.append(_examine(args, path, bar))
            except OptionError as error:
                if path == args.checkpoint:
                    _refuse(args, path, str(error))
                raise
        bar.set_description_str("done")
    if len(found) > 1 and len(found[0][0].dictionary) != len(found[1][0].dictionary):
        raise OptionError(f"--compare {args.compare} has another dictionary than {args.checkpoint}")
    subject, measured, verdicts = found[0]
    status = exit_status(verdicts)
    seconds = time.perf_counter() - begin
    page = report_page(subject, measured, verdicts, status, seconds, found[1] if len(found) > 1 else None)
    _write(args.out, page)
    if args.json is not None:
        _write(args.json, json.dumps(_numbers(found, status, seconds), indent=1, allow_nan=False) + "\n")
    for verdict in verdicts:
        print(f"{verdict.level:>4}  {verdict.title}. {verdict.sentence}")
    print(f"\n{args.out}")
    return status


def _examine(args: argparse.Namespace, path: str, bar: Any) -> tuple[Subject, Measured, list[Verdict]]:
    subject = load(args, path)
    begin = bar.n

    def tell(stage: str) -> None:
        bar.update(begin + STAGES.index(stage) - bar.n if stage in STAGES else 0)
        bar.set_description_str(stage)

    measured = measure(subject, tell)
    bar.update(begin + len(STAGES) - bar.n)
    return subject, measured, judge(measured)


def _refuse(args: argparse.Namespace, path: str, sentence: str) -> None:
    """Write a page that says why there is nothing to measure."""
    verdicts = [Verdict("bad", "It could not be measured", f"{sentence}.", "")]
    if "NaN or infinity" in sentence:
        rows = "; ".join(rows_not_finite(path))
        verdicts = [
            Verdict("bad", "The weights are not finite", f"{sentence}. What is not finite: {rows}.", "")
        ]
    _write(args.out, refusal_page(path, verdicts))


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _numbers(
    found: Sequence[tuple[Subject, Measured, list[Verdict]]], status: int, seconds: float
) -> dict[str, Any]:
    """All that is on the page, as JSON can have it: without what is known of each token."""
    models = []
    for _, measured, verdicts in found:
        fields = {f.name: getattr(measured, f.name) for f in dataclasses.fields(measured)}
        fields["passed"] = measured.passed.summary()
        fields["bits_per_byte"] = measured.bits_per_byte
        models.append(_plain({"verdicts": verdicts, **fields}))
    numbers = {"status": status, "seconds": round(seconds, 1), **models[0]}
    return numbers | ({"other": models[1]} if len(models) > 1 else {})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for NaN and infinity
    return value


main = command_line(PROGRAM, lambda argv: run(parse(argv)), failure=2)
