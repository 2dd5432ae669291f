"""`deq_transformer_lm` and its named architectures."""

from dataclasses import dataclass
from typing import Any

from fairseq.dataclass import ChoiceEnum
from fairseq.models import register_model

from ..errors import OptionError
from ..layers.composition import compose
from ..layers.transformer.activation import ACTIVATIONS
from ..layers.transformer.layer import TransformerLayer
from ..layers.transformer.norm import NORMS
from ..layers.transformer.positions import POSITIONS
from ..options import check_values, is_on, named_size, option, switch
from .deq_config import DEQLanguageModelConfig
from .deq_decoder import DEQDecoder
from .deq_language_model import DEQLanguageModel
from .segment_decoder import InputOptions

ActivationFn = ChoiceEnum(list(ACTIVATIONS))
DecoderNorm = ChoiceEnum(list(NORMS))
DecoderPositions = ChoiceEnum(list(POSITIONS))


@dataclass
class DEQTransformerConfig(DEQLanguageModelConfig):
    """Options of the DEQ-Transformer."""

    decoder_ffn_embed_dim: int = option(1024, "channels of the feed-forward part", valid="[1, 1048576]")
    decoder_attention_heads: int = option(8, "attention heads", valid="[1, 65536]")
    decoder_head_dim: int = option(0, "channels per head; 0: width / heads", valid="[0, 65536]")
    decoder_normalize_before: str = switch(False, "normalise before attention and feed-forward (pre-norm)")
    decoder_closing_norm: str = switch(
        True,
        "end the pre-norm form with a norm (true); or, as in the reference code, normalise the residual to "
        "which the feed-forward part is added instead (false)",
        decoder_normalize_before="true",
    )
    activation_fn: ActivationFn = option(
        "relu", "activation function between the two matrices of the feed-forward part"
    )
    decoder_gated_ffn: str = switch(
        False,
        "gate the feed-forward part with a third matrix: W_2 (act(W_1 h) * W_3 h)",
    )
    decoder_norm: DecoderNorm = option(
        "layer",
        "norms inside the layer: LayerNorm (layer) or RMSNorm (rms)",
    )
    decoder_norm_affine: str = switch(
        False, "give every norm of the layer a learned gain, and with --decoder-norm layer a bias too"
    )
    decoder_input_residual: str = switch(
        False,
        "add the input to the residual stream of each layer of f too, not only to queries, keys and values",
    )
    decoder_positions: DecoderPositions = option(
        "relative",
        "how attention learns distances: by a score for each relative distance (relative), or by rotating "
        "queries and keys (rotary)",
    )
    decoder_layers: int = option(1, "number of layers in f, each with its own weights", valid="[1, 1000]")
    attention_dropout: float = option(
        0.0, "dropout of attention weights, the same in all evaluations of a solve", valid="[0, 1)"
    )
    local_size: int = option(0, "how many positions a query can look back; 0: no limit", valid="[0, inf)")


@register_model("deq_transformer_lm", dataclass=DEQTransformerConfig)
class DEQTransformerLanguageModel(DEQLanguageModel):
    """A Transformer language model at the equilibrium of one layer, or of several in turn.

    Source: Bai, Kolter, Koltun (2019, arXiv 1909.01377).
    """

    @classmethod
    def build_model(cls, cfg: DEQTransformerConfig, task: Any) -> "DEQTransformerLanguageModel":
        """A new model.

        Raises:
            ValueError: an option cannot work; the sentence names it and the valid values.
        """
        _check(cfg)
        layers = [
            TransformerLayer(
                dim=cfg.decoder_embed_dim,
                ffn_dim=cfg.decoder_ffn_embed_dim,
                heads=cfg.decoder_attention_heads,
                head_dim=cfg.decoder_head_dim or cfg.decoder_embed_dim // cfg.decoder_attention_heads,
                pre_norm=is_on(cfg, "decoder_normalize_before"),
                weight_norm=is_on(cfg, "wnorm"),
                dropout=cfg.dropout,
                attention_dropout=cfg.attention_dropout,
                local_size=cfg.local_size,
                closing_norm=is_on(cfg, "decoder_closing_norm"),
                activation=str(cfg.activation_fn),
                gated_ffn=is_on(cfg, "decoder_gated_ffn"),
                norm=str(cfg.decoder_norm),
                norm_affine=is_on(cfg, "decoder_norm_affine"),
                input_residual=is_on(cfg, "decoder_input_residual"),
                positions=str(cfg.decoder_positions),
            )
            for _ in range(cfg.decoder_layers)
        ]
        inputs = InputOptions(scale=cfg.decoder_embed_dim**0.5, dropout=cfg.dropout)
        return cls.of(DEQDecoder(cfg, task.source_dictionary, compose(layers), inputs), cfg, task)


def _check(cfg: DEQTransformerConfig) -> None:
    check_values(cfg, DEQTransformerConfig)
    if not is_on(cfg, "decoder_closing_norm") and not is_on(cfg, "decoder_normalize_before"):
        raise OptionError(
            "--decoder-closing-norm false needs --decoder-normalize-before: post-norm always ends with a norm"
        )
    if cfg.decoder_embed_dim % 2:
        raise OptionError(f"--decoder-embed-dim must be even, got {cfg.decoder_embed_dim}")
    if not cfg.decoder_head_dim and cfg.decoder_embed_dim % cfg.decoder_attention_heads:
        raise OptionError(
            f"--decoder-embed-dim {cfg.decoder_embed_dim} is not a multiple of --decoder-attention-heads "
            f"{cfg.decoder_attention_heads}; change one, or set --decoder-head-dim"
        )
    head_dim = cfg.decoder_head_dim or cfg.decoder_embed_dim // cfg.decoder_attention_heads
    if str(cfg.decoder_positions) == "rotary" and head_dim % 2:
        raise OptionError(
            f"--decoder-positions rotary needs heads with an even number of channels, got {head_dim}; "
            "change --decoder-attention-heads, or set --decoder-head-dim"
        )


@named_size(
    decoder_embed_dim=128,
    decoder_ffn_embed_dim=512,
    decoder_attention_heads=4,
    share_decoder_input_output_embed=True,
    init_std=0.05,
)
class TinyConfig(DEQTransformerConfig):
    """For a CPU and a small text: trains in minutes."""


@register_model("deq_transformer_lm_tiny", dataclass=TinyConfig)
class DEQTransformerTiny(DEQTransformerLanguageModel):
    """`deq_transformer_lm` in the size of `TinyConfig`."""


@named_size(
    decoder_embed_dim=128,
    decoder_ffn_embed_dim=448,
    decoder_attention_heads=4,
    activation_fn="gelu",
    decoder_norm_affine=True,
    decoder_input_residual=True,
    share_decoder_input_output_embed=True,
    init_std=0.05,
    pretrain_layers=1,
)
class MiniConfig(DEQTransformerConfig):
    """As many parameters as `TinyConfig`, with what helped in measurements: GELU, norms with gain and bias,
    the token in the residual stream, and a first phase (`--pretrain-steps`) with the layer applied once."""


@register_model("deq_transformer_lm_mini", dataclass=MiniConfig)
class DEQTransformerMini(DEQTransformerLanguageModel):
    """`deq_transformer_lm` in the size of `MiniConfig`."""


@named_size(
    decoder_embed_dim=700,
    decoder_ffn_embed_dim=48000,
    decoder_attention_heads=10,
    decoder_head_dim=70,
    dropout=0.05,
    wnorm=True,
    init="fan_in",
    adaptive_input=True,
    adaptive_input_cutoff="20000,40000,200000",
    adaptive_softmax_cutoff="20000,40000,200000",
    tie_adaptive_weights=True,
    tie_adaptive_proj=True,
    f_thres=30,
    b_thres=40,
    pretrain_steps=16000,
    mem_len=150,
    subseq_len=75,
)
class WikiText103Config(DEQTransformerConfig):
    """The released WikiText-103 script of 2019: width 700, 10 heads of 70, feed-forward 48000."""


@register_model("deq_transformer_lm_wt103", dataclass=WikiText103Config)
class DEQTransformerWikiText103(DEQTransformerLanguageModel):
    """`deq_transformer_lm` in the size of `WikiText103Config`."""
