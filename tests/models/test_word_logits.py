"""Output biases and the projection of the adaptive head: in training, evaluation and scores alike."""

from __future__ import annotations

import pytest
import torch
from models.builders import build, task, tokens

from fairseq_deq.criterions.deq_lm_loss import DEQLanguageModelLoss

ADAPTIVE = {"adaptive_input": "true", "adaptive_input_cutoff": "10,30", "adaptive_softmax_cutoff": "10,30"}
TIED = ADAPTIVE | {"tie_adaptive_weights": "true", "tie_adaptive_proj": "true"}
ON = {"output_bias": "true", "adaptive_softmax_projection": "true"}
SHARED = {"share_decoder_input_output_embed": "true"}
HEAD = "decoder.adaptive_softmax.head"
TAILS = {f"decoder.adaptive_softmax.tail.{i}.2.bias" for i in (0, 1)}
# A softmax, the options that add to it, and the parameters that they add.
CASES = {
    "adaptive": (ADAPTIVE, ON, {f"{HEAD}.bias", f"{HEAD}.projection.weight"} | TAILS),
    "adaptive, tied": (
        TIED,
        ON,
        {f"{HEAD}.word_proj.bias", f"{HEAD}.class_proj.bias", f"{HEAD}.projection.weight"} | TAILS,
    ),
    "projection alone": (
        TIED,
        {"adaptive_softmax_projection": "true"},
        {f"{HEAD}.projection.weight"},
    ),
    "full": ({}, {"output_bias": "true"}, {"decoder.output_projection.bias"}),
    "full, shared": (
        SHARED,
        {"output_bias": "true"},
        {"decoder.output_projection.bias", "decoder.output_projection.weight"},
    ),
}


def _log_probs(model, source):
    return model.get_normalized_probs(model(source), log_probs=True)


@pytest.mark.parametrize("case", CASES)
def test_they_begin_as_nothing_and_are_named_only_where_they_are(case):
    plain, more, names = CASES[case]
    without, withal = build(seed=1, **plain), build(seed=2, **plain, **more)
    missing, unexpected = withal.load_state_dict(without.state_dict(), strict=False)
    left_out = {n for n in unexpected if not n.endswith("_float_tensor")}
    assert (set(missing), left_out) == (names, set())
    if case == "full, shared":
        assert withal.decoder.output_projection.weight is withal.decoder.embed_tokens.weight
    with torch.no_grad():
        found, expected = (_log_probs(model, tokens(2, 9)) for model in (withal, without))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_scores_and_trains_all_of_them(case):
    plain, more, names = CASES[case]
    model, source = build(**plain, **more), tokens(3, 8)
    target = tokens(3, 8, seed=2)
    target[0, 0] = 5  # of the first band
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in names:
            parameters[name].add_(torch.randn_like(parameters[name]))
    sample = {"net_input": {"src_tokens": source}, "target": target, "ntokens": 24, "id": torch.arange(3)}
    loss, _, _ = DEQLanguageModelLoss(task(), sentence_avg=False)(model, sample)
    scores = _log_probs(model, source).gather(-1, target.unsqueeze(-1))
    assert loss.item() == pytest.approx(-scores.sum().item(), rel=1e-6)
    loss.backward()
    assert all(float(parameters[name].grad.norm()) > 0 for name in names)


def test_a_projection_needs_an_adaptive_softmax():
    from fairseq_deq.models.deq_transformer_lm import DEQTransformerConfig
    from fairseq_deq.options import ignored

    cfg = DEQTransformerConfig(adaptive_softmax_projection="true")
    assert [*dict(ignored(cfg, DEQTransformerConfig))] == ["adaptive_softmax_projection"]
