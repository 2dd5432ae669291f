"""Renames the weights of a checkpoint to the names that they have in an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..options import is_on

_PREFIX = "decoder."
# Tensors that are left out: those that only training uses, and those of fairseq that are no weights.
_LEFT_OUT = ("knowledge.", "adaptive_softmax.version")
_UNSET = "_float_tensor"


@dataclass
class Weights:
    """Tensors of an exported model.

    Attributes:
        tensors: by name, float32, each with its own memory.
        tied: names of the tensors that the model uses in a second place too.
        types: number of symbols in the dictionary.
        rank: of the preconditioner; 0: there is none.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    types: int = 0
    rank: int = 0

    @property
    def stored(self) -> int:
        """Number of parameters; what was learned from solves (`LEARNED`) is not counted."""
        return sum(t.numel() for name, t in self.tensors.items() if not name.startswith(LEARNED))

    @property
    def effective(self) -> int:
        """The same, where a tensor that is used in two places counts twice."""
        return self.stored + sum(self.tensors[name].numel() for name in self.tied)


#: Prefixes of the tensors that were learned from solves.
LEARNED = ("preconditioner.", "start.")


def exported_weights(state: Mapping[str, Tensor], chosen: SimpleNamespace, family: str, path: Any) -> Weights:
    """The weights of a checkpoint, renamed, with weight norm applied.

    Args:
        state: the weights of the checkpoint by name.
        chosen: options of the model.
        family: `transformer` or `trellisnet`.
        path: of the checkpoint, for messages.
    Raises:
        OptionError: weights are missing, or there are some that the options do not describe.
    """
    source = _Source(state, path)
    weights = Weights()
    if family == "transformer":
        several = int(chosen.decoder_layers) > 1
        for i in range(chosen.decoder_layers):
            _transformer(source, weights, f"layer.layers.{i}" if several else "layer", chosen)
    else:
        _linear(source, weights, "layer.conv", bias=True)
    gain = source.take("injection.gain", optional=True)
    weights.tensors["injection.weight"] = _normalized(source.take("injection.weight"), gain)
    weights.tensors["injection.bias"] = source.take("injection.bias")
    _embedding(source, weights, is_on(chosen, "adaptive_input"))
    _softmax(source, weights, chosen)
    _learned(source, weights, chosen)
    source.finish()
    return weights


class _Source:
    """The tensors of a checkpoint, each of which is taken once."""

    def __init__(self, state: Mapping[str, Tensor], path: Any) -> None:
        self.left = {_today(name.removeprefix(_PREFIX)): tensor for name, tensor in state.items()}
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, optional: bool = False) -> Any:
        """Take a tensor: as float32, with its own memory.

        Args:
            name: its name, without `decoder.`.
            optional: whether it may be missing.
        Returns:
            the tensor; None if it is optional and missing.
        Raises:
            OptionError: it is missing and not optional.
        """
        tensor = self.left.pop(name, None)
        if tensor is None and not optional:
            raise OptionError(
                f"{self.path} has no weights {_PREFIX}{name}, which its options ask for; was it saved by "
                "this package, and does --model-overrides keep its sizes?"
            )
        return None if tensor is None else tensor.detach().to(torch.float32, copy=True).contiguous()

    def take_tied(self, name: str, other: Tensor) -> None:
        """Take a tensor that the options tie to `other`, and drop it.

        Raises:
            OptionError: the two differ, or the first is missing.
        """
        if not torch.equal(self.take(name), other):
            raise OptionError(
                f"{self.path}: {_PREFIX}{name} differs from the tensor that its options tie it to; "
                "the checkpoint is damaged"
            )

    def finish(self) -> None:
        """Refuse weights that no part of the export has taken.

        Raises:
            OptionError: there are some.
        """
        more = [n for n in self.left if not n.startswith(_LEFT_OUT) and not n.endswith(_UNSET)]
        if more:
            raise OptionError(
                f"{self.path} has weights that an export does not know ({_PREFIX}{more[0]}, {len(more)} in "
                "all); the weights are those of another model than its options describe"
            )


def _today(name: str) -> str:
    """The present name of a weight that may have the name of an older version."""
    return f"layer.{name.removeprefix('cell.')}" if name.startswith("cell.") else name


def _normalized(v: Tensor, gain: Tensor | None) -> Tensor:
    return v if gain is None else torch._weight_norm(v, gain, 0)


def _transformer(source: _Source, weights: Weights, layer: str, chosen: SimpleNamespace) -> None:
    gate = ["ffn_gate"] if is_on(chosen, "decoder_gated_ffn") else []
    relative = ["relative"] if str(chosen.decoder_positions) == "relative" else []
    for name in ("qkv", *relative, "out", "ffn_in", *gate, "ffn_out"):
        _linear(source, weights, f"{layer}.{name}", bias=name not in ("qkv", "relative"))
    vectors = ["content_bias", "position_bias"] if relative else []
    if is_on(chosen, "decoder_norm_affine"):
        norms = ["middle_norm"]
        norms += ["attention_norm"] if is_on(chosen, "decoder_normalize_before") else []
        norms += ["closing_norm"] if is_on(chosen, "decoder_closing_norm") else []
        parts = ("gain", "bias") if str(chosen.decoder_norm) == "layer" else ("gain",)
        vectors += [f"{norm}.{part}" for norm in norms for part in parts]
    for name in vectors:
        weights.tensors[f"{layer}.{name}"] = source.take(f"{layer}.{name}")


def _linear(source: _Source, weights: Weights, name: str, bias: bool) -> None:
    gain = source.take(f"{name}.weight_g", optional=True)
    weights.tensors[f"{name}.weight"] = _normalized(source.take(f"{name}.weight_v"), gain)
    if bias:
        weights.tensors[f"{name}.bias"] = source.take(f"{name}.bias")


def _embedding(source: _Source, weights: Weights, adaptive: bool) -> None:
    if not adaptive:
        weights.tensors["embedding.weight"] = source.take("embed_tokens.weight")
        weights.types = weights.tensors["embedding.weight"].shape[0]
        return
    i = 0
    while i == 0 or f"embed_tokens.embeddings.{i}.0.weight" in source:
        words = weights.tensors[f"embedding.words.{i}"] = source.take(f"embed_tokens.embeddings.{i}.0.weight")
        weights.tensors[f"embedding.projections.{i}"] = source.take(f"embed_tokens.embeddings.{i}.1.weight")
        weights.types += words.shape[0]
        i += 1


def _softmax(source: _Source, weights: Weights, chosen: SimpleNamespace) -> None:
    tensors = weights.tensors
    if not chosen.adaptive_softmax_cutoff:
        if is_on(chosen, "share_decoder_input_output_embed"):
            weights.tied.append("embedding.weight")
            if is_on(chosen, "output_bias"):
                source.take_tied("output_projection.weight", tensors["embedding.weight"])
        else:
            tensors["softmax.weight"] = source.take("output_projection.weight")
        if is_on(chosen, "output_bias"):
            tensors["softmax.bias"] = source.take("output_projection.bias")
        return
    tied, tied_projections = is_on(chosen, "tie_adaptive_weights"), is_on(chosen, "tie_adaptive_proj")
    softmax = "adaptive_softmax"
    if tied:
        source.take_tied(f"{softmax}.head.word_proj.weight", tensors["embedding.words.0"])
        weights.tied.append("embedding.words.0")
        tensors["softmax.head"] = source.take(f"{softmax}.head.class_proj.weight")
    else:
        tensors["softmax.head"] = source.take(f"{softmax}.head.weight")
    biased = is_on(chosen, "output_bias")
    if biased:
        parts = ("word_proj.bias", "class_proj.bias") if tied else ("bias",)
        tensors["softmax.head_bias"] = torch.cat([source.take(f"{softmax}.head.{part}") for part in parts])
    if is_on(chosen, "adaptive_softmax_projection"):
        tensors["softmax.projection"] = source.take(f"{softmax}.head.projection.weight")
    i = 0
    while f"{softmax}.tail.{i}.0.weight" in source:
        if biased:
            tensors[f"softmax.biases.{i}"] = source.take(f"{softmax}.tail.{i}.2.bias")
        for place, is_tied, ours in ((2, tied, "words"), (0, tied_projections, "projections")):
            name, own = f"{softmax}.tail.{i}.{place}.weight", f"embedding.{ours}.{i + 1}"
            if is_tied:
                source.take_tied(name, tensors[own])
                weights.tied.append(own)
            else:
                tensors[f"softmax.{ours}.{i}"] = source.take(name)
        i += 1


def _learned(source: _Source, weights: Weights, chosen: SimpleNamespace) -> None:
    """Take the preconditioner and the learned start, if they were learned and the options use them."""
    for module, names, wanted in (
        ("preconditioner", ("left", "right"), bool(chosen.preconditioner_rank)),
        ("start", ("weight",), is_on(chosen, "learned_start")),
    ):
        prefix = f"knowledge.learned_{module}."
        renewals = source.take(prefix + "renewals", optional=True)
        if wanted and renewals is not None and float(renewals) > 0:
            for name in names:
                weights.tensors[f"{module}.{name}"] = source.take(prefix + name)
    left = weights.tensors.get("preconditioner.left")
    if left is not None:
        weights.rank = left.shape[1]
