"""Words in and words out: embeddings and softmax, fairseq's where they are adaptive."""

from __future__ import annotations

from typing import Any

from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from torch import nn

from ..errors import OptionError
from ..options import flag, is_on
from .deq_config import DEQLanguageModelConfig
from .word_logits import BiasedAdaptiveSoftmax, BiasedTiedLinear


def embedding(cfg: DEQLanguageModelConfig, dictionary: Any) -> nn.Module:
    """What turns tokens into embeddings: fairseq's adaptive input, or a table.

    Args:
        cfg: options of the model.
        dictionary: fairseq's dictionary.
    """
    size, pad, dim = len(dictionary), dictionary.pad(), cfg.decoder_embed_dim
    if is_on(cfg, "adaptive_input"):
        assert cfg.adaptive_input_cutoff is not None
        bands = _cutoffs(cfg.adaptive_input_cutoff)
        return AdaptiveInput(size, pad, dim, cfg.adaptive_input_factor, dim, bands)
    table = nn.Embedding(size, dim, pad)
    nn.init.normal_(table.weight, std=cfg.embed_std or dim**-0.5)
    nn.init.zeros_(table.weight[pad])
    return table


def softmax(
    cfg: DEQLanguageModelConfig, dictionary: Any, embed_tokens: nn.Module, dim: int
) -> tuple[AdaptiveSoftmax | None, nn.Module | None]:
    """fairseq's adaptive softmax, or the projection of the full one; neither where that is the embedding.

    Args:
        cfg: options of the model.
        dictionary: fairseq's dictionary.
        embed_tokens: what turns tokens into embeddings.
        dim: channels of the features.
    Raises:
        OptionError: the features do not have the width of the embeddings that they share.
    """
    size = len(dictionary)
    for tied in ("share_decoder_input_output_embed", "tie_adaptive_weights"):
        if is_on(cfg, tied) and dim != cfg.decoder_embed_dim:
            raise OptionError(
                f"{flag(tied)} ties the softmax to the embeddings, so --decoder-embed-dim "
                f"{cfg.decoder_embed_dim} must be the channels that the softmax sees, {dim}; leave it out"
            )
    bias = is_on(cfg, "output_bias")
    if cfg.adaptive_softmax_cutoff:
        more = {"bias": bias, "projection": is_on(cfg, "adaptive_softmax_projection")}
        kind, extra = (BiasedAdaptiveSoftmax, more) if any(more.values()) else (AdaptiveSoftmax, {})
        softmax = kind(
            size,
            dim,
            _cutoffs(cfg.adaptive_softmax_cutoff),
            dropout=cfg.adaptive_softmax_dropout,
            adaptive_inputs=embed_tokens if is_on(cfg, "tie_adaptive_weights") else None,
            factor=cfg.adaptive_softmax_factor,
            tie_proj=is_on(cfg, "tie_adaptive_proj"),
            **extra,
        )
        return softmax, None
    if is_on(cfg, "share_decoder_input_output_embed"):
        assert isinstance(embed_tokens, nn.Embedding)
        return None, BiasedTiedLinear(embed_tokens.weight) if bias else None
    projection = nn.Linear(dim, size, bias=bias)
    nn.init.normal_(projection.weight, std=dim**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return None, projection


def _cutoffs(text: str) -> list[int]:
    """The numbers of a cut-off option."""
    return [int(number) for number in text.split(",")]
