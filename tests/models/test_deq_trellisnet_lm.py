"""Sizes of the named TrellisNets, and the options that cannot work."""

import pytest
import torch
from fairseq.models import MODEL_REGISTRY
from models.builders import build_trellis, task

from fairseq_deq.models.deq_trellisnet_lm import (
    DEQTrellisNetPennTreebank,
    DEQTrellisNetTiny,
    DEQTrellisNetWikiText103,
    DEQTrellisNetWikiText103Paper,
    PennTreebankTrellisConfig,
    TinyTrellisConfig,
    WikiText103PaperTrellisConfig,
    WikiText103TrellisConfig,
)

# Types of fairseq's dictionaries; the papers' vocabularies have 10,000 and 267,735.
PENN_TREEBANK_TYPES, WIKITEXT_103_TYPES = 10008, 267744


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _on_meta(model, config, types: int, **options):
    with torch.device("meta"):
        return model.build_model(config(**options), task(types - 4))


def _layer(hidden: int, embed: int, gains: int) -> int:
    """Parameters of both convolutions: weights, biases, and norms of weight norm."""
    return 4 * hidden * (2 * hidden + 2 * embed) + (2 + gains) * 4 * hidden


def test_ptb_has_the_size_of_the_paper():
    model = _on_meta(DEQTrellisNetPennTreebank, PennTreebankTrellisConfig, PENN_TREEBANK_TYPES)
    decoder = model.decoder
    layer = _count(decoder.layer) + _count(decoder.injection)
    assert layer == _layer(1400, 400, gains=0) == 20_171_200
    # fairseq's tied softmax has no biases, and its dictionary 8 types more.
    assert _count(model) == 24_174_400
    assert _count(model) + 10_000 - 8 * 400 == 24_181_200


@pytest.mark.parametrize(
    ("model", "config", "embed", "hidden", "layer_size", "reference"),
    [
        (DEQTrellisNetWikiText103, WikiText103TrellisConfig, 500, 2000, 40_032_000, 174_167_235),
        (
            DEQTrellisNetWikiText103Paper,
            WikiText103PaperTrellisConfig,
            512,
            2112,
            44_368_896,
            181_716_951,
        ),
    ],
    ids=["released", "paper"],
)
@pytest.mark.parametrize("softmax", ["adaptive", "full"])
def test_wt103_differs_from_the_reference_by_what_fairseq_has_and_leaves_out(
    model, config, embed, hidden, layer_size, reference, softmax
):
    full = {
        "adaptive_input": "false",
        "adaptive_softmax_cutoff": None,
        "tie_adaptive_weights": "false",
        "tie_adaptive_proj": "false",
        "share_decoder_input_output_embed": "true",
    }
    built = _on_meta(model, config, WIKITEXT_103_TYPES, **(full if softmax == "full" else {}))
    layer = _count(built.decoder.layer) + _count(built.decoder.injection)
    assert layer == _layer(hidden, embed, gains=2) == layer_size
    output_biases, more_types = 267_735, 9 * embed
    difference = output_biases - more_types
    if softmax == "adaptive":  # a projection for each of the 4 bands, and 3 cluster vectors in the head
        difference -= 4 * embed * embed + 3 * embed
    assert _count(built) + difference == reference


def test_tiny_size():
    model = _on_meta(DEQTrellisNetTiny, TinyTrellisConfig, 4000)
    assert _count(model) == _layer(256, 128, gains=2) + 4000 * 128


@pytest.mark.parametrize("suffix", ["", "_tiny", "_ptb", "_wt103", "_wt103_paper"])
def test_each_architecture_is_a_registered_model(suffix):
    assert f"deq_trellisnet_lm{suffix}" in MODEL_REGISTRY


def test_tied_weights_are_one_parameter():
    model = _on_meta(DEQTrellisNetWikiText103, WikiText103TrellisConfig, WIKITEXT_103_TYPES)
    embed, softmax = model.decoder.embed_tokens, model.decoder.adaptive_softmax
    assert softmax.head.word_proj.weight is embed.embeddings[0][0].weight
    for band in (1, 2, 3):
        assert softmax.tail[band - 1][0].weight is embed.embeddings[band][1].weight
        assert softmax.tail[band - 1][2].weight is embed.embeddings[band][0].weight


def test_initial_weights_have_the_asked_for_spread():
    model = build_trellis(decoder_embed_dim=64, nhid=64, init_std=0.037)
    for weight in (model.decoder.layer.conv.weight(), model.decoder.injection.weight):
        assert weight.std().item() == pytest.approx(0.037, rel=0.03)
    assert torch.allclose(
        model.decoder.injection.gain, model.decoder.injection.weight.norm(dim=1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("config", "std"),
    [(TinyTrellisConfig, 0.3), (PennTreebankTrellisConfig, 400**-0.5)],
    ids=["tiny", "ptb"],
)
def test_embeddings_start_as_wide_as_the_preset_says(config, std):
    small = {"decoder_embed_dim": 400, "nhid": 8}
    model = DEQTrellisNetTiny.build_model(config(**small), task(500))
    assert model.decoder.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"embed_std": -0.1}, "--embed-std must be at least 0, got -0.1"),
        ({"embed_std": float("nan")}, "--embed-std must be at least 0, got nan"),
        ({"dilation": 2}, "--dilation must be 1, got 2"),
        ({"ksize": 1}, "--ksize must be in .2, 1000."),
        ({"nhid": -1}, "--nhid must be in .0, 65536."),
        ({"gradient": "shine"}, "--gradient shine needs --solver-scope position, sample or batch"),
        ({"wdrop": 1.0}, r"--wdrop must be in \[0, 1\)"),
        ({"emb_dropout": -0.1}, r"--emb-dropout must be in \[0, 1\)"),
        ({"nout": 5, "share_decoder_input_output_embed": "true"}, "--nout 5 must be --decoder-embed-dim 16"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_trellis(**options)


def test_the_output_may_have_another_width_than_the_embeddings():
    model = build_trellis(nout=5, nhid=7, share_decoder_input_output_embed="false")
    assert model.decoder.output_projection.weight.shape[1] == 5
    assert model.decoder.layer.hidden_dim == 12
