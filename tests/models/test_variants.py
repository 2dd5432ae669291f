"""Variants of the Transformer's layer through the decoder: the contracts of the published one hold."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models.builders import build, check_causality, decode, features, tokens

PAD = 1
ALL = {
    "activation_fn": "silu",
    "decoder_gated_ffn": "true",
    "decoder_norm": "rms",
    "decoder_norm_affine": "true",
    "decoder_input_residual": "true",
}
FORMS = [
    {"activation_fn": "gelu", "decoder_norm_affine": "true", "decoder_input_residual": "true"},
    ALL,
    ALL | {"decoder_normalize_before": "true", "wnorm": "true"},
    ALL | {"decoder_normalize_before": "true", "decoder_layers": 2, "decoder_positions": "rotary"},
    {"decoder_positions": "rotary", "local_size": 3},
]
# Not every position converges, and those that do not are gathered; 23 inner channels fill no vector.
UNSETTLED = {"f_solver": "anderson", "f_eps": 1e-3, "init_std": 0.5, "active_set": "always"}
UNSETTLED |= {"decoder_ffn_embed_dim": 23}


@pytest.mark.parametrize("budget", [2, 9])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_changed_token_leaves_all_before_it_bitwise_unchanged(options, budget):
    check_causality(build(dtype=torch.float32, f_thres=budget, **(UNSETTLED | options)), budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_sample_does_not_depend_on_its_batch_mates(options, dtype):
    source = tokens(4, 16)
    source[1, :4] = source[2, -5:] = source[3, :2] = PAD
    for budget in (1, 9):
        model = build(dtype=dtype, f_thres=budget, **(UNSETTLED | options))
        together = features(model, source)
        for row in range(4):
            alone, real = features(model, source[row : row + 1]), source[row] != PAD
            assert torch.equal(alone[0, real], together[row, real]), (budget, row)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_padding_and_parts_of_a_text_change_nothing(options):
    model, source = build(mem_len=100, **options), tokens(2, 10)
    pads, expected = torch.full((2, 3), PAD), features(model, source)
    close = partial(torch.allclose, atol=1e-8)
    assert close(features(model, torch.cat([pads, source], 1))[:, 3:], expected)
    assert close(features(model, torch.cat([source, pads], 1))[:, :10], expected)
    assert close(features(build(subseq_len=4, **options), source), expected)
    memory, parts = None, []
    for part in source.split(4, 1):
        with torch.no_grad():
            x, extra = model.extract_features(part, memory=memory)
        memory = extra["memory"]
        parts.append(x)
    assert close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_decoding_equals_teacher_forcing_and_follows_the_beams(options):
    model, generator = build(**options), torch.Generator().manual_seed(5)
    decoded, source = decode(model, tokens(3, 12), 4, lambda end: torch.randint(3, (3,), generator=generator))
    with torch.no_grad():
        whole, _ = model(source)
    assert torch.allclose(decoded, whole[:, 3:], atol=1e-8)


@pytest.mark.parametrize("options", [*FORMS[:2], FORMS[4]], ids=str)
def test_ift_is_the_gradient_of_a_long_unroll(options):
    source = tokens(2, 6)

    def gradients(**mode):
        model = build(**(options | mode))
        x, _ = model.extract_features(source)
        x.mul(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    implicit = gradients(f_eps=1e-12, b_eps=1e-12)
    unrolled = gradients(gradient="unroll", f_thres=150)
    assert implicit.keys() == unrolled.keys()
    for name, grad in unrolled.items():
        assert grad.abs().max() > 0, name
        assert torch.allclose(implicit[name], grad, atol=1e-8 * (1 + grad.abs().max())), name


def test_norms_begin_as_those_without_parameters():
    model = build(decoder_norm_affine="true")  # which draws them, to tell them apart
    layer = model.decoder.layer
    fresh = type(layer)(16, 32, 2, 8, False, False, 0.0, 0.0, 0, norm_affine=True)
    names = [name for name, _ in fresh.named_parameters() if "norm." in name]
    assert names == ["middle_norm.gain", "middle_norm.bias", "closing_norm.gain", "closing_norm.bias"]
    for name, parameter in fresh.named_parameters():
        if name in names:
            assert (parameter == float(name.endswith("gain"))).all()
