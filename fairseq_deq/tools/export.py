"""Write a trained model for transformers; running it needs neither fairseq nor this package.

    fairseq-deq-export checkpoints/checkpoint_best.pt exported --data data-bin/wikitext-2
    fairseq-deq-export quickstart/checkpoints/checkpoint_last.pt exported --data quickstart/bin \\
        --sentencepiece-model quickstart/text/sentencepiece.model
    fairseq-deq-export checkpoints/checkpoint_best.pt exported --model-overrides "{'f_eps': 1e-4}"

The folder then has the weights (model.safetensors), the configuration, the code (torch and transformers
alone) and the tokenizer, and loads with

    AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    AutoTokenizer.from_pretrained("exported", trust_remote_code=True)

The checkpoint is read as data and not changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..export.folder import export, summary
from ..literals import literal
from .command import command_line, describe

PROGRAM = "fairseq-deq-export"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint of a DEQ language model")
    add("folder", metavar="DIR", type=Path, help="folder to write; it must not exist yet, or be empty")
    add(
        "--data",
        metavar="DATA",
        help="data folder with the dict.txt (default: the data folder of the training)",
    )
    add(
        "--sentencepiece-model",
        metavar="FILE",
        help="the sentencepiece model with which the training text was cut",
    )
    add(
        "--model-overrides",
        default="{}",
        metavar="DICT",
        help="options of the model to change, such as \"{'f_eps': 1e-4}\"",
    )
    add("--json", action="store_true", help="print the numbers as one JSON object")
    args = parser.parse_args(argv)
    args.model_overrides = literal(args.model_overrides)
    is_named = isinstance(args.model_overrides, dict) and all(
        isinstance(k, str) for k in args.model_overrides
    )
    if not is_named:
        raise OptionError("--model-overrides must be a dictionary, like \"{'f_thres': 120}\"")
    return args


def sentences(numbers: dict[str, Any]) -> str:
    """The numbers of a model in words.

    Args:
        numbers: as `export.folder.summary` gives them.
    """
    tied = numbers["tied"]
    twice = f"; {', '.join(tied)}: tied, and used for the softmax too" if tied else "; no weights are tied"
    rank = numbers["preconditioner_rank"]
    learned = [f"a preconditioner of rank {rank}"] * bool(rank) + ["a learned start"] * numbers[
        "learned_start"
    ]
    return (
        f"{numbers['folder']}: a {numbers['family']} of {numbers['updates']:,} updates, with "
        f"{numbers['types']:,} types\n"
        f"parameters: {numbers['parameters_stored']:,} stored (unique), "
        f"{numbers['parameters_in_effect']:,} in effect{twice}\n"
        f"solves: {' and '.join(learned) or 'nothing learned of them'}; tolerance {numbers['f_eps']:g}, "
        f"at most {numbers['f_thres']} evaluations"
    )


def run(argv: Sequence[str] | None = None) -> None:
    """Export, and say what was written.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option is wrong, or the checkpoint cannot be exported.
    """
    args = parse(argv)
    exported = export(args.checkpoint, args.folder, args.data, args.sentencepiece_model, args.model_overrides)
    numbers = summary(exported, args.folder)
    print(json.dumps(numbers) if args.json else sentences(numbers))


main = command_line(PROGRAM, run)
