"""`deq_trellisnet_lm` and its named architectures."""

from dataclasses import dataclass
from typing import Any

from fairseq.models import register_model

from ..errors import OptionError
from ..layers.trellis.layer import TrellisLayer
from ..options import check_values, is_on, named_size, option, switch
from .deq_config import DEQLanguageModelConfig, Scope
from .deq_decoder import DEQDecoder
from .deq_language_model import DEQLanguageModel
from .segment_decoder import InputOptions


@dataclass
class DEQTrellisNetConfig(DEQLanguageModelConfig):
    """Options of the DEQ-TrellisNet."""

    nhid: int = option(256, "channels of the hidden state besides those of the output", valid="[0, 65536]")
    nout: int = option(
        0,
        "channels of the output, which are the last ones of the hidden state; 0: the width of the embeddings",
        valid="[0, 65536]",
    )
    ksize: int = option(
        2, "width of the convolutions: the number of positions that one sees", valid="[2, 1000]"
    )
    dilation: int = option(
        1, "distance between the positions that a convolution sees; must be 1", valid="[1, inf)"
    )
    dropout: float = option(0.0, "variational dropout of the output", valid="[0, 1)")
    dropouti: float = option(0.0, "variational dropout of the embeddings", valid="[0, 1)")
    dropouth: float = option(
        0.0, "variational dropout of the hidden state inside the convolution", valid="[0, 1)"
    )
    emb_dropout: float = option(0.0, "dropout of whole words of the dictionary", valid="[0, 1)")
    wdrop: float = option(0.0, "dropout of the convolution's weights for past positions", valid="[0, 1)")
    wnorm: str = switch(True, "normalise the weights of both convolutions (weight norm)")
    # h lies in (-1, 1): with small embeddings a tied softmax stays flat for long.
    embed_std: float = option(
        0.3,
        "standard deviation of the initial embeddings, 0: 1/sqrt(width); --adaptive-input uses fairseq's",
        valid="[0, inf)",
    )
    mem_len: int = option(
        0,
        "above 0: a segment starts from the last state of the segment before it; 0: from zero",
        valid="[0, inf)",
    )
    solver_scope: Scope = option(
        "recurrence",
        "what is solved as one unknown: one position after another (recurrence), each position but all at "
        "once (position), each sample, or the whole batch; with sample and batch a result depends on later "
        "tokens until the solve has converged",
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
            f"--dilation must be 1, got {cfg.dilation}: an equilibrium has one layer, so the positions "
            "that a wider step skips would never be seen; to let a position see more, raise --ksize"
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


@named_size(
    decoder_embed_dim=128,
    nhid=128,
    share_decoder_input_output_embed=True,
    init_std=0.05,
)
class TinyTrellisConfig(DEQTrellisNetConfig):
    """For a CPU and a small text: trains in minutes."""


@register_model("deq_trellisnet_lm_tiny", dataclass=TinyTrellisConfig)
class DEQTrellisNetTiny(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `TinyTrellisConfig`."""


@named_size(
    decoder_embed_dim=400,
    nhid=1000,
    share_decoder_input_output_embed=True,
    wnorm=False,
    init_std=0.01,
    embed_std=0.0,
    dropout=0.45,
    dropouti=0.45,
    dropouth=0.28,
    emb_dropout=0.1,
    wdrop=0.5,
    pretrain_layers=58,
    mem_len=1,
)
class PennTreebankTrellisConfig(DEQTrellisNetConfig):
    """Word-level Penn Treebank: 400/1000/400, with the regularisation of the explicit TrellisNet."""


@register_model("deq_trellisnet_lm_ptb", dataclass=PennTreebankTrellisConfig)
class DEQTrellisNetPennTreebank(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `PennTreebankTrellisConfig`."""


@named_size(
    decoder_embed_dim=500,
    nhid=1500,
    dropout=0.1,
    dropouti=0.1,
    dropouth=0.1,
    init_std=0.01,
    adaptive_input=True,
    adaptive_input_cutoff="2800,20000,76000",
    adaptive_input_factor=1.0,
    adaptive_softmax_cutoff="2800,20000,76000",
    adaptive_softmax_factor=1.0,
    tie_adaptive_weights=True,
    tie_adaptive_proj=True,
    f_thres=45,
    b_thres=45,
    pretrain_steps=30000,
    pretrain_layers=40,
    mem_len=1,
    subseq_len=50,
)
class WikiText103TrellisConfig(DEQTrellisNetConfig):
    """The released WikiText-103 script of 2019: 500/1500/500, cut-offs 2800, 20000, 76000."""


@register_model("deq_trellisnet_lm_wt103", dataclass=WikiText103TrellisConfig)
class DEQTrellisNetWikiText103(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `WikiText103TrellisConfig`."""


@named_size(
    decoder_embed_dim=512,
    nhid=1600,
)
class WikiText103PaperTrellisConfig(WikiText103TrellisConfig):
    """The size of the papers' WikiText-103 model: 512/1600/512."""


@register_model("deq_trellisnet_lm_wt103_paper", dataclass=WikiText103PaperTrellisConfig)
class DEQTrellisNetWikiText103Paper(DEQTrellisNetLanguageModel):
    """`deq_trellisnet_lm` in the size of `WikiText103PaperTrellisConfig`."""
