"""A model of the reference as options and weights of `deq_transformer_lm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .reference import Band, Reference
from .vocabulary import Placement

#: The bias of a symbol that the reference has not: its probability is 0, in every precision.
NEVER = -10000.0


@dataclass(frozen=True)
class Converted:
    """What a checkpoint is made of.

    Attributes:
        options: those of the model, as they are typed.
        weights: by name.
        multiplied: whether projections were multiplied out, which makes more parameters of the same maths.
    """

    options: list[str]
    weights: dict[str, Tensor]
    multiplied: bool


def convert(reference: Reference, placement: Placement, pre_norm: bool, local_size: int) -> Converted:
    """Translate a model.

    Args:
        reference: its weights.
        placement: of its words in fairseq's dictionary.
        pre_norm: whether it was trained with `--pre_lnorm`.
        local_size: positions that a query looks back at.
    """
    heads, head_dim = reference.content_bias.shape
    options = [
        *("--decoder-embed-dim", str(reference.dim)),
        *("--decoder-ffn-embed-dim", str(reference.linears["ffn_in"].v.shape[0])),
        *("--decoder-attention-heads", str(heads), "--decoder-head-dim", str(head_dim)),
        *("--local-size", str(local_size)),
    ]
    if reference.linears["qkv"].g is not None:
        options.append("--wnorm")
    if pre_norm:
        options += ["--decoder-normalize-before", "--decoder-closing-norm", "false"]
    weights = {
        "layer.content_bias": reference.content_bias,
        "layer.position_bias": reference.position_bias,
        "injection.weight": reference.injection,
        "injection.bias": reference.injection_bias,
    }
    for name, linear in reference.linears.items():
        for part, tensor in (("weight_v", linear.v), ("weight_g", linear.g), ("bias", linear.bias)):
            if tensor is not None:
                weights[f"layer.{name}.{part}"] = tensor
    more, words, multiplied = _words(reference, placement)
    return Converted(
        options=[*options, *more],
        weights={f"decoder.{name}": tensor for name, tensor in (weights | words).items()},
        multiplied=multiplied,
    )


def _words(reference: Reference, placement: Placement) -> tuple[list[str], dict[str, Tensor], bool]:
    """Options and weights of embeddings and softmax, and whether projections were multiplied out."""
    bands, classes = list(reference.bands), reference.classes
    factor = _factor([band.embedding.shape[1] for band in bands], reference.dim)
    alone = len(bands) == 1
    projected = (bands[0].embedding_projection, bands[0].softmax_projection) != (None, None)
    multiplied = factor is None or (alone and projected)
    if multiplied:
        factor = 1
        if not alone:
            classes = _product(classes, bands[0].softmax_projection)
        bands = [_multiplied_out(band) for band in bands]
    first = bands[0]
    bands[0] = replace(
        first,
        embedding=_placed(first.embedding, placement.first, 0.0),
        softmax=_placed(first.softmax, placement.first, 0.0),
        bias=_placed(first.bias, placement.first, NEVER),
    )
    if alone:
        return (*_full(bands[0]), multiplied)
    ends = ",".join(str(cutoff + placement.shift) for cutoff in reference.cutoffs)
    assert factor is not None
    return (*_adaptive(bands, classes, reference.class_bias, ends, factor), multiplied)


def _factor(widths: Sequence[int], dim: int) -> int | None:
    """The whole number by which bands narrow from `dim` on; None: there is none."""
    for factor in range(1, dim + 2):
        if all(width == dim // factor**i for i, width in enumerate(widths)):
            return factor
    return None


def _product(weight: Tensor, projection: Tensor | None) -> Tensor:
    """weight P^T, (n, C), of weight (n, w) and P (C, w)."""
    return weight if projection is None else (weight.double() @ projection.double().T).float()


def _multiplied_out(band: Band) -> Band:
    return Band(
        embedding=_product(band.embedding, band.embedding_projection),
        embedding_projection=None,
        softmax=_product(band.softmax, band.softmax_projection),
        softmax_projection=None,
        bias=band.bias,
    )


def _placed(rows: Tensor, numbers: Sequence[int], absent: float) -> Tensor:
    """The rows of these numbers; `absent` for -1."""
    index = torch.tensor(numbers)
    placed = rows[index.clamp(min=0)]
    placed[index < 0] = absent
    return placed


def _full(band: Band) -> tuple[list[str], dict[str, Tensor]]:
    """Of one table, and the full softmax."""
    options, weights = ["--output-bias"], {"embed_tokens.weight": band.embedding}
    if torch.equal(band.embedding, band.softmax):
        options.append("--share-decoder-input-output-embed")
    weights["output_projection.weight"] = band.softmax
    weights["output_projection.bias"] = band.bias
    return options, weights


def _adaptive(
    bands: Sequence[Band], classes: Tensor, class_bias: Tensor, ends: str, factor: int
) -> tuple[list[str], dict[str, Tensor]]:
    """Of the adaptive input and softmax, whose projections are the identity where a band has none."""
    dim = bands[0].embedding.shape[1]

    def projection(given: Tensor | None) -> Tensor:
        return torch.eye(dim) if given is None else given

    tied = all(torch.equal(band.embedding, band.softmax) for band in bands)
    ins = [projection(band.embedding_projection) for band in bands]
    outs = [projection(band.softmax_projection) for band in bands]
    tied_outs = tied and all(torch.equal(into, out) for into, out in zip(ins[1:], outs[1:]))
    options = [
        *("--adaptive-input", "--adaptive-input-cutoff", ends, "--adaptive-input-factor", str(factor)),
        *("--adaptive-softmax-cutoff", ends, "--adaptive-softmax-factor", str(factor), "--output-bias"),
    ]
    head, weights = "adaptive_softmax.head", {}
    if bands[0].softmax_projection is not None:
        options.append("--adaptive-softmax-projection")
        weights[f"{head}.projection.weight"] = outs[0].T
    if tied:
        options.append("--tie-adaptive-weights")
        weights[f"{head}.word_proj.weight"] = bands[0].softmax
        weights[f"{head}.word_proj.bias"] = bands[0].bias
        weights[f"{head}.class_proj.weight"] = classes
        weights[f"{head}.class_proj.bias"] = class_bias
        if tied_outs:
            options.append("--tie-adaptive-proj")
    else:
        weights[f"{head}.weight"] = torch.cat([bands[0].softmax, classes])
        weights[f"{head}.bias"] = torch.cat([bands[0].bias, class_bias])
    for i, band in enumerate(bands):
        weights[f"embed_tokens.embeddings.{i}.0.weight"] = band.embedding
        weights[f"embed_tokens.embeddings.{i}.1.weight"] = ins[i]
        if i:
            weights[f"adaptive_softmax.tail.{i - 1}.0.weight"] = outs[i] if tied_outs else outs[i].T
            weights[f"adaptive_softmax.tail.{i - 1}.2.weight"] = band.softmax
            weights[f"adaptive_softmax.tail.{i - 1}.2.bias"] = band.bias
    return options, weights
