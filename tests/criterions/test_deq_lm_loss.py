"""The loss is cross-entropy, and its statistics are sums that workers may add."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics
from models.builders import build, dictionary, tokens

from fairseq_deq.criterions.deq_lm_loss import DEQLanguageModelLoss


def _criterion():
    return DEQLanguageModelLoss(SimpleNamespace(target_dictionary=dictionary()), sentence_avg=False)


def _sample(source, target):
    return {
        "net_input": {"src_tokens": source, "src_lengths": torch.full((source.shape[0],), source.shape[1])},
        "target": target,
        "ntokens": int(target.ne(1).sum()),
    }


@pytest.mark.parametrize("cutoff", [None, "10,30"])
def test_loss_is_the_cross_entropy_of_the_normalised_output(cutoff):
    model = build(adaptive_softmax_cutoff=cutoff)
    source, target = tokens(3, 7), tokens(3, 7, seed=2)
    target[0, 4:] = 1  # padding does not count
    sample = _sample(source, target)
    loss, size, logged = _criterion()(model, sample)
    log_probs = model.get_normalized_probs(model(source), log_probs=True).double()
    expected = F.nll_loss(log_probs.flatten(0, 1), target.flatten(), ignore_index=1, reduction="sum")
    assert torch.allclose(loss, expected, atol=1e-6)
    assert size == logged["ntokens"] == 18
    by_token, _, _ = _criterion()(model, sample, reduce=False)
    assert torch.allclose(
        by_token,
        F.nll_loss(log_probs.flatten(0, 1), target.flatten(), ignore_index=1, reduction="none"),
        atol=1e-6,
    )


def test_one_token_in_a_cluster_is_scored():
    model = build(adaptive_softmax_cutoff="10,30")
    target = torch.tensor([[5, 40, 6, 7]])
    loss, _, _ = _criterion()(model, _sample(tokens(1, 4), target))
    log_probs = model.get_normalized_probs(model(tokens(1, 4)), log_probs=True)
    assert torch.allclose(loss, -log_probs.gather(-1, target.unsqueeze(-1)).sum(), atol=1e-6)


def test_backward_statistics_appear_in_what_was_logged_before():
    model = build().train()
    loss, _, logged = _criterion()(model, _sample(tokens(2, 6), tokens(2, 6, seed=2)))
    assert logged["f_lanes_sum"] == 12
    assert logged["b_lanes_sum"] == 0
    loss.backward()
    assert logged["b_lanes_sum"] == 12
    assert logged["b_conv_sum"] == 12
    assert logged["b_nfe_sum"] >= logged["b_lane_nfe_sum"] > 0


def test_means_over_workers_are_weighted_by_their_lanes():
    def output(lanes, nfe, loss, tokens):
        stats = {"lanes": lanes, "nfe": lanes * nfe, "lane_nfe": lanes * nfe, "res": 0.0, "conv": lanes}
        return {
            "loss": torch.tensor(loss),
            "ntokens": tokens,
            "nsentences": 1,
            "sample_size": tokens,
            **{f"{p}_{name}_sum": torch.tensor(float(v)) for p in "fb" for name, v in stats.items()},
        }

    outputs = [output(10, 4.0, 30.0, 10), output(30, 8.0, 50.0, 30)]
    with metrics.aggregate(new_root=True) as seen:
        DEQLanguageModelLoss.reduce_metrics(outputs)
    values = seen.get_smoothed_values()
    assert values["f_nfe"] == pytest.approx(7.0)
    assert values["b_conv"] == pytest.approx(1.0)
    assert values["loss"] == pytest.approx(80 / 40 / 0.693147, abs=1e-3)
    assert DEQLanguageModelLoss.logging_outputs_can_be_summed()


def test_a_stack_logs_no_solve():
    model = build(pretrain_steps=5).train()
    _, _, logged = _criterion()(model, _sample(tokens(2, 6), tokens(2, 6, seed=2)))
    with metrics.aggregate(new_root=True) as seen:
        DEQLanguageModelLoss.reduce_metrics([logged])
    assert "f_nfe" not in seen.get_smoothed_values()


def test_fairseqs_own_models_can_use_the_loss():
    model = build()

    def forward(**net_input):
        x, _ = model(net_input["src_tokens"])
        return x, {}

    forward.get_targets = model.get_targets  # type: ignore[attr-defined]
    forward.decoder = model.decoder  # type: ignore[attr-defined]
    loss, _, _ = _criterion()(forward, _sample(tokens(1, 4), tokens(1, 4, seed=2)))
    assert torch.isfinite(loss)
