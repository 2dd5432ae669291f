"""Write a trained model for transformers: no fairseq and nothing of this package is needed to run it.

    fairseq-deq-export CHECKPOINT DIR [--data DATA] [--sentencepiece-model FILE]

DIR then has the weights (`model.safetensors`), the configuration, the code (torch and transformers alone) and
the tokenizer, and loads with

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)

Examples:

    fairseq-deq-export checkpoints/checkpoint_best.pt exported --data data-bin/wikitext-2
    fairseq-deq-export quickstart/checkpoints/checkpoint_last.pt exported --data quickstart/bin \\
        --sentencepiece-model quickstart/text/sentencepiece.model
    fairseq-deq-export checkpoint_best.pt exported --model-overrides "{'f_eps': 1e-4, 'f_thres': 60}"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import OptionError
from ..literals import literal
from .checkpoint import Exported, read_model
from .remote.decoder_deq import DEQDecoder
from .tokenizer import BOS, EOS, PAD, find_dictionary, read_dictionary, write_json, write_tokenizer

_PROGRAM = "fairseq-deq-export"
REMOTE = Path(__file__).with_name("remote")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        _PROGRAM,
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of a DEQ language model")
    add("folder", metavar="DIR", type=Path, help="folder to write, which is not there yet, or empty")
    add("--data", metavar="DATA", help="data folder with the dict.txt (default: that of the training)")
    add("--sentencepiece-model", metavar="FILE", help="that the text of the training was cut with")
    add("--model-overrides", default="{}", metavar="DICT", help="options of the model to change")
    add("--json", action="store_true", help="print the numbers as one JSON object")
    args = parser.parse_args(argv)
    args.model_overrides = literal(args.model_overrides)
    if not isinstance(args.model_overrides, dict) or not all(
        isinstance(k, str) for k in args.model_overrides
    ):
        raise OptionError("--model-overrides must be a dictionary, like \"{'f_thres': 60}\"")
    return args


def export(
    checkpoint: str,
    folder: Path,
    data: str | None = None,
    pieces: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> Exported:
    """Write a model and its tokenizer.

    Args:
        checkpoint: its path.
        folder: where to; nothing may be in it.
        data: folder of the dictionary; None: that of the training.
        pieces: path of the sentencepiece model; None: the text was cut at spaces.
        overrides: options of the model to change.
    Returns:
        what was written.
    Raises:
        OptionError: it cannot be exported; the sentence says why, and nothing is written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise OptionError('safetensors is not installed: pip install "fairseq-deq[export]"') from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is there already and not an empty folder; give the name of a new one")
    exported = read_model(checkpoint, overrides or {})
    _check_shapes(exported, checkpoint)
    words = read_dictionary(find_dictionary(data, exported.data, checkpoint), exported.options.vocab_size)
    unfinished = folder.absolute().with_name(f"{folder.absolute().name}.tmp{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        write_tokenizer(unfinished, words, pieces, exported.begins_with_bos)
        write_json(unfinished / "config.json", _config(exported))
        write_json(unfinished / "generation_config.json", _ids(exported) | {"suppress_tokens": [PAD]})
        for file in sorted(REMOTE.glob("*_deq.py")):
            if file.stem != "tokenization_deq" or pieces is not None:
                shutil.copyfile(file, unfinished / file.name)
        weights = {f"model.{name}": tensor for name, tensor in exported.weights.tensors.items()}
        file = unfinished / "model.safetensors"
        save_file(weights, str(file), metadata={"format": "pt"})
        file.chmod((unfinished / "config.json").stat().st_mode)  # it made one for its owner alone
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return exported


def _check_shapes(exported: Exported, checkpoint: str) -> None:
    """Refuse weights of other sizes than the options say."""
    try:
        with torch.device("meta"):
            decoder = DEQDecoder(exported.options)
        decoder.load_state_dict(exported.weights.tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise OptionError(
            f"the weights of {checkpoint} are not those of its options ({lines[-1].strip()}); does "
            "--model-overrides keep its sizes?"
        ) from None


def _ids(exported: Exported) -> dict[str, Any]:
    first = BOS if exported.begins_with_bos else EOS
    return {"bos_token_id": first, "eos_token_id": EOS, "pad_token_id": PAD}


def _config(exported: Exported) -> dict[str, Any]:
    return {
        "architectures": ["DEQForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deq.DEQConfig",
            "AutoModelForCausalLM": "modeling_deq.DEQForCausalLM",
        },
        "model_type": "deq_lm",
        "dtype": "float32",
        "exported_by": f"fairseq_deq {__version__}",
        "tie_word_embeddings": False,
        **_ids(exported),
        **dataclasses.asdict(exported.options),
    }


def summary(exported: Exported, folder: Path) -> dict[str, Any]:
    """The numbers that the command prints."""
    weights = exported.weights
    return {
        "folder": str(folder),
        "family": exported.options.family,
        "updates": exported.updates,
        "types": weights.types,
        "parameters_stored": weights.stored,
        "parameters_in_effect": weights.effective,
        "tied": list(weights.tied),
        "preconditioner_rank": weights.rank,
        "learned_start": exported.options.learned_start,
        "f_eps": exported.options.f_eps,
        "f_thres": exported.options.f_thres,
    }


def sentences(numbers: dict[str, Any]) -> str:
    """The same in words."""
    tied = numbers["tied"]
    twice = f"; {', '.join(tied)}: tied, and used for the softmax too" if tied else "; no weights are tied"
    learned = [f"a preconditioner of rank {numbers['preconditioner_rank']}"] * bool(
        numbers["preconditioner_rank"]
    )
    learned += ["a learned start"] * numbers["learned_start"]
    return (
        f"{numbers['folder']}: a {numbers['family']} of {numbers['updates']:,} updates, with "
        f"{numbers['types']:,} types\n"
        f"parameters: {numbers['parameters_stored']:,} stored (unique), "
        f"{numbers['parameters_in_effect']:,} in effect{twice}\n"
        f"solves: {' and '.join(learned) or 'nothing learned of them'}; tolerance {numbers['f_eps']:g}, "
        f"at most {numbers['f_thres']} evaluations"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.
    Returns:
        the exit status: 0, or 1 where a sentence said why nothing was written.
    """
    try:
        args = parse(argv)
        exported = export(
            args.checkpoint, args.folder, args.data, args.sentencepiece_model, args.model_overrides
        )
    except (OptionError, OSError) as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    numbers = summary(exported, args.folder)
    print(json.dumps(numbers) if args.json else sentences(numbers))
    return 0


def cli_main() -> None:
    """The entry point."""
    sys.exit(main())


if __name__ == "__main__":
    cli_main()
