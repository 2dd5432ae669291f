"""`deq_trellisnet_lm` and its named architectures."""

from dataclasses import dataclass
from typing import Any, Optional

from fairseq.models import register_model

from ..errors import OptionError
from ..layers.trellis.layer import TrellisLayer
from ..options import check_values, is_on, option, switch
from .deq_config import DEQLanguageModelConfig, Scope
from .deq_decoder import DEQDecoder
from .deq_language_model import DEQLanguageModel
from .segment_decoder import InputOptions


@dataclass
class DEQTrellisNetConfig(DEQLanguageModelConfig):
    """Options of the DEQ-TrellisNet."""

    nhid: int = option(256, "channels of the hidden state beside those of the output", valid="[0, 65536]")
    nout: int = option(
        0,
        "channels of the output, the last of the hidden state; 0: those of the embeddings",
        valid="[0, 65536]",
    )
    ksize: int = option(2, "taps of the convolutions: positions that one sees", valid="[2, 1000]")
    dilation: int = option(1, "distance of the taps; only 1 can be solved as one layer", valid="[1, inf)")
    dropout: float = option(0.0, "variational dropout of the output", valid="[0, 1)")
    dropouti: float = option(0.0, "variational dropout of the embeddings", valid="[0, 1)")
    dropouth: float = option(
        0.0, "variational dropout of the hidden state inside the convolution", valid="[0, 1)"
    )
    emb_dropout: float = option(0.0, "dropout of whole words of the dictionary", valid="[0, 1)")
    wdrop: float = option(0.0, "dropout of the convolution's weights on past positions", valid="[0, 1)")
    wnorm: str = switch(True, "normalise the weights of both convolutions (weight norm)")
    # h lies in (-1, 1): with small embeddings a tied softmax stays flat for long.
    embed_std: float = option(
        0.3,
        "standard deviation of the initial embeddings, 0: 1/sqrt(width); --adaptive-input has fairseq's own",
        valid="[0, inf)",
    )
    solver_scope: Scope = option(
        "recurrence",
        "what is solved as one unknown: position after position (recurrence), all positions side by side "
        "(position), sample, batch; sample and batch are not causal until they have converged",
    )


@register_model("deq_trellisnet_lm", dataclass=DEQTrellisNetConfig)
class DEQTrellisNetLanguageModel(DEQLanguageModel):
    """A TrellisNet language model of one layer at its equilibrium.

    Source: Bai, Kolter, Koltun (2019, arXiv 1810.06682 and 1909.01377).
    """

    @classmethod
    def build_model(cls, cfg: DEQTrellisNetConfig, task: Any) -> "DEQTrellisNetLanguageModel":
        """A new model.

        Raises:
            ValueError: an option cannot work; the sentence names it and the valid values.
        """
        _check(cfg)
        output_dim = cfg.nout or cfg.decoder_embed_dim
        layer = TrellisLayer(
            hidden_dim=cfg.nhid + output_dim,
            output_dim=output_dim,
            kernel_size=cfg.ksize,
            weight_norm=is_on(cfg, "wnorm"),
            dropout=cfg.dropouth,
            weight_dropout=cfg.wdrop,
        )
        inputs = InputOptions(
            scale=1.0,
            dropout=cfg.dropouti,
            word_dropout=cfg.emb_dropout,
            window=cfg.ksize,
            weight_norm=is_on(cfg, "wnorm"),
        )
        return cls.of(DEQDecoder(cfg, task.source_dictionary, layer, inputs), cfg, task)


def _check(cfg: DEQTrellisNetConfig) -> None:
    check_values(cfg, DEQTrellisNetConfig)
    if cfg.dilation != 1:
        raise OptionError(
            f"--dilation must be 1, got {cfg.dilation}: an equilibrium has one layer, so positions that a "
            "wider step leaves out would never meet; --ksize widens what a position sees"
        )
    if str(cfg.gradient) == "shine" and str(cfg.solver_scope) == "recurrence":
        raise OptionError(
            "--gradient shine needs --solver-scope position, sample or batch: a recurrence keeps no estimate "
            "of the inverse Jacobian"
        )
    if cfg.nout not in (0, cfg.decoder_embed_dim) and is_on(cfg, "share_decoder_input_output_embed"):
        raise OptionError(
            f"--nout {cfg.nout} must be --decoder-embed-dim {cfg.decoder_embed_dim} (or 0) where "
            "--share-decoder-input-output-embed ties the softmax to the embeddings"
        )
    if cfg.nout not in (0, cfg.decoder_embed_dim) and is_on(cfg, "tie_adaptive_weights"):
        raise OptionError(
            f"--nout {cfg.nout} must be --decoder-embed-dim {cfg.decoder_embed_dim} (or 0) where "
            "--tie-adaptive-weights ties the softmax to the embeddings"
        )


@dataclass
class TinyTrellisConfig(DEQTrellisNetConfig):
    """For a CPU and a small text: trains in minutes."""

    decoder_embed_dim: int = option(128, "width of the embeddings")
    nhid: int = option(128, "channels of the hidden state beside those of the output")
    share_decoder_input_output_embed: str = switch(True, "tie the softmax to the input embedding")
    init_std: float = option(0.05, "standard deviation of --init normal")


@register_model("deq_trellisnet_lm_tiny", dataclass=TinyTrellisConfig)
class DEQTrellisNetTiny(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `TinyTrellisConfig`."""


@dataclass
class PennTreebankTrellisConfig(DEQTrellisNetConfig):
    """Word-level Penn Treebank: 400/1000/400, with the regularisation of the explicit TrellisNet."""

    decoder_embed_dim: int = option(400, "width of the embeddings")
    nhid: int = option(1000, "channels of the hidden state beside those of the output")
    share_decoder_input_output_embed: str = switch(True, "tie the softmax to the input embedding")
    wnorm: str = switch(False, "normalise the weights of both convolutions (weight norm)")
    init_std: float = option(0.01, "standard deviation of --init normal")
    embed_std: float = option(0.0, "standard deviation of the initial embeddings, 0: 1/sqrt(width)")
    dropout: float = option(0.45, "variational dropout of the output")
    dropouti: float = option(0.45, "variational dropout of the embeddings")
    dropouth: float = option(0.28, "variational dropout of the hidden state inside the convolution")
    emb_dropout: float = option(0.1, "dropout of whole words of the dictionary")
    wdrop: float = option(0.5, "dropout of the convolution's weights on past positions")
    pretrain_layers: int = option(58, "layers of that stack")
    mem_len: int = option(1, "above 0: the state of the previous segment is carried on")


@register_model("deq_trellisnet_lm_ptb", dataclass=PennTreebankTrellisConfig)
class DEQTrellisNetPennTreebank(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `PennTreebankTrellisConfig`."""


@dataclass
class WikiText103TrellisConfig(DEQTrellisNetConfig):
    """The released WikiText-103 script of 2019: 500/1500/500, cut-offs 2800, 20000, 76000."""

    decoder_embed_dim: int = option(500, "width of the embeddings")
    nhid: int = option(1500, "channels of the hidden state beside those of the output")
    dropout: float = option(0.1, "variational dropout of the output")
    dropouti: float = option(0.1, "variational dropout of the embeddings")
    dropouth: float = option(0.1, "variational dropout of the hidden state inside the convolution")
    init_std: float = option(0.01, "standard deviation of --init normal")
    adaptive_input: str = switch(True, "use fairseq's adaptive input")
    adaptive_input_cutoff: Optional[str] = option("2800,20000,76000", "comma separated cut-offs")
    adaptive_input_factor: float = option(1.0, "factor by which the adaptive input's bands narrow")
    adaptive_softmax_cutoff: Optional[str] = option("2800,20000,76000", "comma separated cut-offs")
    adaptive_softmax_factor: float = option(1.0, "factor by which the adaptive softmax's tails narrow")
    tie_adaptive_weights: str = switch(True, "tie the words of adaptive softmax and adaptive input")
    tie_adaptive_proj: str = switch(True, "tie the projections of adaptive softmax and adaptive input")
    f_thres: int = option(45, "evaluations of f at most, in the forward pass")
    b_thres: int = option(45, "vector-Jacobian products at most, in the backward pass")
    pretrain_steps: int = option(30000, "updates trained as a tied stack before the equilibrium phase")
    pretrain_layers: int = option(40, "layers of that stack")
    mem_len: int = option(1, "above 0: the state of the previous segment is carried on")
    subseq_len: int = option(50, "positions solved at a time; 0: the whole segment")


@register_model("deq_trellisnet_lm_wt103", dataclass=WikiText103TrellisConfig)
class DEQTrellisNetWikiText103(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `WikiText103TrellisConfig`."""


@dataclass
class WikiText103PaperTrellisConfig(WikiText103TrellisConfig):
    """The size of the papers' WikiText-103 model: 512/1600/512."""

    decoder_embed_dim: int = option(512, "width of the embeddings")
    nhid: int = option(1600, "channels of the hidden state beside those of the output")


@register_model("deq_trellisnet_lm_wt103_paper", dataclass=WikiText103PaperTrellisConfig)
class DEQTrellisNetWikiText103Paper(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `WikiText103PaperTrellisConfig`."""
