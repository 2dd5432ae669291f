"""Writes the folder of an exported model, which transformers loads."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import OptionError
from .checkpoint import Exported, read_model
from .remote.decoder_deq import DEQDecoder
from .tokenizer import BOS, EOS, PAD, find_dictionary, read_dictionary, write_json, write_tokenizer

REMOTE = Path(__file__).with_name("remote")


def export(
    checkpoint: str,
    folder: Path,
    data: str | None = None,
    pieces: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> Exported:
    """Write a model and its tokenizer to a folder.

    Args:
        checkpoint: path of the checkpoint.
        folder: where to write; it must be empty, or not exist.
        data: folder of the dictionary; None: the data folder that the checkpoint names.
        pieces: path of the sentencepiece model; None: the text was split at spaces.
        overrides: options of the model to change.
    Returns:
        the model that was written.
    Raises:
        OptionError: it cannot be exported; the sentence says why, and nothing is written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise OptionError('safetensors is not installed: pip install "fairseq-deq[export]"') from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} already exists and is not an empty folder; give the name of a new one")
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
        file.chmod((unfinished / "config.json").stat().st_mode)  # else only its owner could read it
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return exported


def _check_shapes(exported: Exported, checkpoint: str) -> None:
    """Refuse weights whose sizes differ from those in the options."""
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
    """What was written, by name: sizes, counts and options.

    Args:
        exported: the model.
        folder: where it was written.
    """
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
