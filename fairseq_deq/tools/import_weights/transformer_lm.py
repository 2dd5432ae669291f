"""The embeddings and the softmax of a stock `transformer_lm` as the start of a DEQ-Transformer's training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint_file import options_in, read_checkpoint_at
from ...errors import OptionError
from ...options import flag

_WORDS = ("decoder.embed_tokens.", "decoder.adaptive_softmax.", "decoder.output_projection.")
_UNSET = "_float_tensor"
# The options that say what the words' weights are; they are those of the checkpoint.
_SWITCHES = (
    "share_decoder_input_output_embed",
    "adaptive_input",
    "tie_adaptive_weights",
    "tie_adaptive_proj",
)
_VALUES = {
    "adaptive_input_cutoff": "adaptive_input",
    "adaptive_input_factor": "adaptive_input",
    "adaptive_softmax_cutoff": "adaptive_softmax_cutoff",
    "adaptive_softmax_factor": "adaptive_softmax_cutoff",
}
_OWN = ("decoder_embed_dim", *_SWITCHES, *_VALUES, "output_bias", "adaptive_softmax_projection")


@dataclass(frozen=True)
class Words:
    """What is taken from a checkpoint.

    Attributes:
        options: what it says of them, as they are typed.
        weights: by name.
        types: of the dictionary.
        data: the folder of its training's data; empty: it says none.
        task_state: of its task.
    """

    options: list[str]
    weights: dict[str, Tensor]
    types: int
    data: str
    task_state: Any


def read_words_of(path: str | os.PathLike[str], given: Sequence[str]) -> Words:
    """Read the embeddings and the softmax of a checkpoint.

    Args:
        path: of a checkpoint of `transformer_lm`.
        given: options of the new model, which may not contradict it.
    Raises:
        OptionError: it is no such checkpoint, or a DEQ model cannot have what it has.
    """
    state = read_checkpoint_at(path)
    model, task = options_in(state, "model"), options_in(state, "task")
    name = str(model.get("_name") or model.get("arch"))
    if not name.startswith("transformer_lm"):
        raise OptionError(
            f"{path} is a checkpoint of {name}; --from-transformer-lm takes one of transformer_lm"
        )
    _refuse(path, model)
    for option in _OWN:
        if any(word == flag(option) or word.startswith(f"{flag(option)}=") for word in given):
            raise OptionError(f"{flag(option)} is that of {path}; leave it out")
    weights = {
        key: tensor
        for key, tensor in state["model"].items()
        if key.startswith(_WORDS) and not key.endswith((_UNSET, ".version"))
    }
    shared = _is_on(model, "share_decoder_input_output_embed")
    if shared:
        weights.pop("decoder.output_projection.weight", None)
    return Words(
        options=_options(model),
        weights=weights,
        types=_types(weights, path),
        data=str(task.get("data") or "").split(os.pathsep)[0],
        task_state=state.get("task_state") or {},
    )


def _is_on(model: Mapping[str, Any], name: str) -> bool:
    return str(model.get(name, False)).lower() == "true"


def _refuse(path: Any, model: Mapping[str, Any]) -> None:
    """Refuse what the words of a DEQ model cannot be."""
    width = model["decoder_embed_dim"]
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if model.get(name, width) != width:
            raise OptionError(
                f"{path} has {flag(name)} {model[name]} and --decoder-embed-dim {width}; a DEQ model's words "
                "are as wide as the model"
            )
    for name in ("no_scale_embedding", "character_embeddings", "layernorm_embedding"):
        if _is_on(model, name):
            raise OptionError(f"{path} was trained with {flag(name)}, which a DEQ model does not have")


def _options(model: Mapping[str, Any]) -> list[str]:
    options = ["--decoder-embed-dim", str(model["decoder_embed_dim"])]
    for name in _SWITCHES:
        options += [flag(name), str(_is_on(model, name)).lower()]
    for name, needed in _VALUES.items():
        if _is_on(model, needed) if needed in _SWITCHES else model.get(needed):
            options += [flag(name), str(model[name])]
    return options


def _types(weights: Mapping[str, Tensor], path: Any) -> int:
    """Words that the embeddings are for."""
    one = weights.get("decoder.embed_tokens.weight")
    if one is not None:
        return one.shape[0]
    i = types = 0
    while (band := weights.get(f"decoder.embed_tokens.embeddings.{i}.0.weight")) is not None:
        types, i = types + band.shape[0], i + 1
    if not types:
        raise OptionError(f"{path} has no embeddings of words that a DEQ model can have")
    return types


def dictionary_of(words: Words, data: Path | None) -> Path:
    """The dict.txt that the words belong to.

    Args:
        words: of the checkpoint.
        data: the folder that has it; None: that of the checkpoint's training.
    Raises:
        OptionError: it is not there.
    """
    folder = data if data is not None else Path(words.data)
    path = folder / "dict.txt"
    if not path.is_file():
        raise OptionError(f"there is no {path}; --data names the folder of the training's dictionary")
    return path
