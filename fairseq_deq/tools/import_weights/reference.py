"""The weights of the reference's DEQ-Transformer of version 2.0, by what they are for.

Names and shapes are those of `DEQTransformerLM` in locuslab/deq (tag v2.0): `word_emb` (adaptive embedding),
`inject_conv`, `func` (the layer), `crit` (adaptive softmax), `pos_emb`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import OptionError
from .state_dict import Tensors


@dataclass(frozen=True)
class Linear:
    """A linear map of the layer: W = g * V / |V|, a norm per row, or W = V where there is no g.

    Attributes:
        v: V, (out, in).
        g: (out, 1), or None.
        bias: (out,), or None.
    """

    v: Tensor
    g: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Band:
    """The words of one band, of n words, w channels wide, in a model of C channels.

    Attributes:
        embedding: (n, w).
        embedding_projection: P, (C, w), or None for the identity; the embedding of word i is P e_i sqrt(C).
        softmax: (n, w).
        softmax_projection: Q, (C, w), or None for the identity; word i has the logit s_i . Q^T z + b_i.
        bias: b, (n,).
    """

    embedding: Tensor
    embedding_projection: Tensor | None
    softmax: Tensor
    softmax_projection: Tensor | None
    bias: Tensor


@dataclass(frozen=True)
class Reference:
    """A model of the reference.

    Attributes:
        linears: of the layer, by the name that this package gives them.
        content_bias, position_bias: r_w and r_r, (H, D).
        injection, injection_bias: (3*C, C) and (3*C,).
        bands: words, the most frequent ones first.
        classes: what stands for bands 1, 2, ... in the first one, (bands - 1, w of the first).
        class_bias: (bands - 1,).
    """

    linears: dict[str, Linear]
    content_bias: Tensor
    position_bias: Tensor
    injection: Tensor
    injection_bias: Tensor
    bands: tuple[Band, ...]
    classes: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    class_bias: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def dim(self) -> int:
        """Channels of the model, C."""
        return self.injection.shape[1]

    @property
    def types(self) -> int:
        """Words of the vocabulary."""
        return sum(band.embedding.shape[0] for band in self.bands)

    @property
    def cutoffs(self) -> list[int]:
        """Numbers of words at which bands but the last end."""
        ends, end = [], 0
        for band in self.bands[:-1]:
            end += band.embedding.shape[0]
            ends.append(end)
        return ends


def read_reference(tensors: Tensors, cutoffs: Sequence[int]) -> Reference:
    """Sort the tensors of a state_dict.

    Args:
        tensors: all of them.
        cutoffs: where the bands of the softmax end that are parts of one table (`--div_val 1`), which the
            shapes do not tell.
    Raises:
        OptionError: some are missing, left over, or do not fit each other.
    """
    injection = tensors.take("inject_conv.weight", None, None)
    dim = injection.shape[1]
    attention, ffn = "func.dec_attn", "func.pos_ff"
    content = tensors.take(f"{attention}.r_w_bias", None, None)
    inner = content.numel()
    if inner != dim:
        raise OptionError(
            f"{tensors.path}: {content.shape[0]} heads of {content.shape[1]} channels are not the {dim} "
            "channels of the model, which the reference's injection needs"
        )
    ffn_in = _linear(tensors, f"{ffn}.ff1_net", None, dim, bias=True)
    linears = {
        "qkv": _linear(tensors, f"{attention}.qkv_net", 3 * dim, dim, bias=False),
        "relative": _linear(tensors, f"{attention}.r_net", dim, dim, bias=False),
        "out": _linear(tensors, f"{attention}.o_net", dim, dim, bias=True),
        "ffn_in": ffn_in,
        "ffn_out": _linear(tensors, f"{ffn}.ff2_net", dim, ffn_in.v.shape[0], bias=True),
    }
    _check_wavelengths(tensors, dim)
    count = sum(f"word_emb.emb_layers.{i}.weight" in tensors for i in range(64))
    words = _bands(tensors, dim, count) if count > 1 else _one_table(tensors, dim, cutoffs)
    reference = Reference(
        linears=linears,
        content_bias=content,
        position_bias=tensors.take(f"{attention}.r_r_bias", *content.shape),
        injection=injection,
        injection_bias=tensors.take("inject_conv.bias", 3 * dim),
        bands=tuple(words),
        **_classes(tensors, words),
    )
    tensors.finish()
    return reference


def _linear(tensors: Tensors, name: str, out: int | None, into: int, bias: bool) -> Linear:
    if f"{name}.weight_v" in tensors:
        v = tensors.take(f"{name}.weight_v", out, into)
        g = tensors.take(f"{name}.weight_g", v.shape[0], 1)
    else:
        v, g = tensors.take(f"{name}.weight", out, into), None
    return Linear(v, g, tensors.take(f"{name}.bias", v.shape[0]) if bias else None)


def _check_wavelengths(tensors: Tensors, dim: int) -> None:
    found = tensors.take("pos_emb.inv_freq", (dim + 1) // 2)
    expected = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if dim % 2 or not torch.allclose(found, expected, rtol=1e-4):
        raise OptionError(
            f"{tensors.path}: pos_emb.inv_freq are not 10000^(-2i/{dim}), of which this package makes its "
            "relative positions"
        )


def _bands(tensors: Tensors, dim: int, count: int) -> list[Band]:
    """Bands that have tables of their own."""
    bands = []
    for i in range(count):
        embedding = tensors.take(f"word_emb.emb_layers.{i}.weight", None, None)
        n, width = embedding.shape
        bands.append(
            Band(
                embedding=embedding,
                embedding_projection=tensors.take(f"word_emb.emb_projs.{i}.weight", dim, width),
                softmax=tensors.take(f"crit.out_layers.{i}.weight", n, width),
                softmax_projection=tensors.take(f"crit.out_projs.{i}.weight", dim, width),
                bias=tensors.take(f"crit.out_layers.{i}.bias", n),
            )
        )
    return bands


def _one_table(tensors: Tensors, dim: int, cutoffs: Sequence[int]) -> list[Band]:
    """One table for all words, which the softmax may part into bands."""
    embedding = tensors.take("word_emb.emb_layers.0.weight", None, None)
    types, width = embedding.shape
    softmax = tensors.take("crit.out_layers.0.weight", types, width)
    bias = tensors.take("crit.out_layers.0.bias", types)
    projection = None
    if "word_emb.emb_projs.0.weight" in tensors:
        projection = tensors.take("word_emb.emb_projs.0.weight", dim, width)
    elif width != dim:
        tensors.take("word_emb.emb_projs.0.weight", dim, width)
    ends = [types]
    if "crit.cluster_weight" in tensors:
        ends = [*cutoffs, types]
        if sorted(set(ends)) != ends:
            raise OptionError(
                f"--cutoffs {','.join(map(str, cutoffs))} must be increasing and below the {types} words of "
                f"{tensors.path}; give those of the training, which the weights do not show"
            )
    bands = []
    for i, (begin, end) in enumerate(zip([0, *ends], ends)):
        name = f"crit.out_projs.{i}.weight"
        of_softmax = tensors.take(name, dim, width) if name in tensors or projection is not None else None
        rows = slice(begin, end)
        bands.append(Band(embedding[rows], projection, softmax[rows], of_softmax, bias[rows]))
    return bands


def _classes(tensors: Tensors, bands: Sequence[Band]) -> dict[str, Tensor]:
    """The classes of bands 1, 2, ...; the reference counts them from the end."""
    if len(bands) == 1:
        return {}
    count, width = len(bands) - 1, bands[0].softmax.shape[1]
    weight = tensors.take("crit.cluster_weight", None, width)
    if weight.shape[0] != count:
        raise OptionError(
            f"{tensors.path} has {weight.shape[0] + 1} bands of words in its softmax, and --cutoffs make "
            f"{count + 1}"
        )
    return {"classes": weight.flip(0), "class_bias": tensors.take("crit.cluster_bias", count).flip(0)}
