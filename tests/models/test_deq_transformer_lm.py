"""Sizes of the named architectures."""

import pytest
import torch
from fairseq.models import MODEL_REGISTRY
from models.builders import build, task

import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq.models.deq_transformer_lm import (
    DEQTransformerTiny,
    DEQTransformerWikiText103,
    TinyConfig,
    WikiText103Config,
)

WIKITEXT_103_TYPES = 267744


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def wt103():
    with torch.device("meta"):
        return DEQTransformerWikiText103.build_model(WikiText103Config(), task(WIKITEXT_103_TYPES - 4))


def test_wt103_layer_has_the_size_of_the_released_script(wt103):
    layer = _count(wt103.decoder.layer) + _count(wt103.decoder.injection)
    # W_qkv, W_r, W_o, the feed-forward part, r_w and r_r, norms of weight norm; then the injection.
    matrices = 700 * (3 * 700 + 700 + 700 + 2 * 48000)
    biases = 700 + 48000 + 700 + 2 * 700
    gains = 2100 + 700 + 700 + 48000 + 700
    assert layer == matrices + biases + gains + 700 * 2100 + 2100 == 71_225_100


def test_wt103_total_differs_from_the_released_script_by_what_fairseq_leaves_out(wt103):
    head_projection, output_biases, fewer_types = 700 * 700, 267735 + 3, 9 * 10
    assert _count(wt103) == 96_934_240
    assert _count(wt103) + head_projection + output_biases - fewer_types == 97_691_888


def test_with_biases_and_a_head_projection_it_has_every_parameter_of_the_released_script():
    ends = "20002,40002,200002"  # two types more, in the first band
    options = {"output_bias": "true", "adaptive_softmax_projection": "true"}
    options |= {"adaptive_input_cutoff": ends, "adaptive_softmax_cutoff": ends}
    with torch.device("meta"):
        model = DEQTransformerWikiText103.build_model(WikiText103Config(**options), task(267735 - 2))
    assert _count(model) == 97_691_888 + 2 * (700 + 1)


def test_tiny_size():
    model = DEQTransformerTiny.build_model(TinyConfig(), task(3996))
    assert _count(model) == 775_552


@pytest.mark.parametrize(
    "name", ["deq_transformer_lm", "deq_transformer_lm_tiny", "deq_transformer_lm_wt103"]
)
def test_each_architecture_is_a_registered_model(name):
    assert name in MODEL_REGISTRY


def test_tied_weights_are_one_parameter(wt103):
    embed, softmax = wt103.decoder.embed_tokens, wt103.decoder.adaptive_softmax
    assert softmax.head.word_proj.weight is embed.embeddings[0][0].weight
    for band in (1, 2, 3):
        assert softmax.tail[band - 1][0].weight is embed.embeddings[band][1].weight
        assert softmax.tail[band - 1][2].weight is embed.embeddings[band][0].weight


def test_initial_weights_have_the_asked_for_spread():
    model = build(decoder_embed_dim=64, decoder_ffn_embed_dim=256, init_std=0.037, wnorm="true")
    for linear in (model.decoder.layer.relative, model.decoder.layer.ffn_in):
        assert linear.weight().std().item() == pytest.approx(0.037, rel=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"f_solver": "newton"}, "--f-solver must be one of anderson"),
        ({"b_thres": 0}, "--b-thres must be in .1, 100000."),
        ({"f_eps": -1.0}, "--f-eps must be in .0, 1."),
        ({"f_eps": 0.0}, "--f-eps must be in .0, 1."),
        ({"pretrain_layers": 0}, "--pretrain-layers must be in .1, 10000."),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\)"),
        ({"decoder_attention_heads": 3}, "not a multiple of --decoder-attention-heads"),
        ({"decoder_positions": "rotary", "decoder_head_dim": 5}, "rotary needs heads with an even number"),
        ({"adaptive_input": "true"}, "--adaptive-input needs --adaptive-input-cutoff"),
        ({"adaptive_softmax_cutoff": "10,400"}, "goes beyond the dictionary of 52 types"),
        ({"adaptive_softmax_cutoff": "20,10"}, "increasing"),
        ({"tie_adaptive_proj": "true"}, "--tie-adaptive-proj needs --tie-adaptive-weights"),
        ({"tie_adaptive_weights": "true"}, "--tie-adaptive-weights needs --adaptive-input"),
        ({"wnorm": "maybe"}, "--wnorm must be true or false"),
        ({"phantom_damping": 0.0, "gradient": "phantom"}, "damping must be in"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**options)


@pytest.mark.parametrize(("value", "norms"), [(True, True), ("true", True), (False, False), ("false", False)])
def test_a_switch_may_come_from_yaml(value, norms):
    assert (build(wnorm=value).decoder.layer.qkv.weight_g is not None) == norms
