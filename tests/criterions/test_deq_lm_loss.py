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


# ---------------------------------------------------------------------- the Jacobian

QUICK = {"f_thres": 4}  # what is asserted holds at any state
JACOBIAN = ("jac_sum", "jac_positions", "sradius_sum", "sradius_rows")


def _means(*outputs):
    with metrics.aggregate(new_root=True) as seen:
        DEQLanguageModelLoss.reduce_metrics(list(outputs))
    return seen.get_smoothed_values()


def test_the_penalty_is_differentiated_and_the_loss_stays_cross_entropy():
    model = build(jac_loss_weight=0.5, **QUICK).train()
    source, target = tokens(3, 7), tokens(3, 7, seed=2)
    target[0, 4:] = 1
    torch.manual_seed(0)
    loss, size, logged = _criterion()(model, _sample(source, target))
    torch.manual_seed(0)
    term = model(source)[1]["jacobian_penalty"]
    plain = build(**QUICK).train()
    cross_entropy, _, without = _criterion()(plain, _sample(source, target))
    assert torch.allclose(loss - cross_entropy, 0.5 * term.value * 18, rtol=1e-9)
    assert size == 18
    assert logged["loss"] == pytest.approx(without["loss"].item(), rel=1e-12)
    assert logged["jac_sum"] == pytest.approx(term.value.item() * 21, rel=1e-9)
    assert logged["jac_positions"] == 21
    assert _means(logged)["jac"] == pytest.approx(term.value.item(), abs=1e-4)
    assert "jac" not in _means(without)
    by_token, _, _ = _criterion()(model, _sample(source, target), reduce=False)
    assert by_token.sum().item() == pytest.approx(cross_entropy.item(), rel=1e-9)


def test_every_worker_and_every_micro_batch_logs_the_same_entries():
    source, target = tokens(2, 6), tokens(2, 6, seed=2)
    keys = []
    for model in (
        build(jac_loss_weight=0.5, **QUICK).train(),
        build(jac_loss_weight=0.5, pretrain_steps=5).train(),
        build(spectral_radius=4, **QUICK),
        build(**QUICK),
    ):
        _, _, logged = _criterion()(model, _sample(source, target))
        keys.append(list(logged))
        assert all(torch.is_tensor(logged[name]) for name in JACOBIAN)
    assert all(names == keys[0] for names in keys)
    assert all(logged[name] == 0 for name in JACOBIAN)


def test_means_of_the_jacobian_are_weighted_by_positions_and_rows():
    empty = {"loss": torch.tensor(1.0), "ntokens": 1, "nsentences": 1, "sample_size": 1}
    zeros = {name: torch.tensor(0.0) for name in JACOBIAN}
    first = zeros | {"jac_sum": torch.tensor(20.0), "jac_positions": torch.tensor(10)}
    second = zeros | {"jac_sum": torch.tensor(10.0), "jac_positions": torch.tensor(30)}
    third = zeros | {"sradius_sum": torch.tensor(3.0), "sradius_rows": torch.tensor(2)}
    seen = _means(*(empty | part for part in (first, zeros, second, third)))
    assert seen["jac"] == pytest.approx(30 / 40)
    assert seen["sradius"] == pytest.approx(1.5)


@torch.no_grad()
def test_the_radius_is_a_mean_over_rows_of_their_largest():
    model = build(spectral_radius=16, **QUICK)
    source, target = tokens(3, 6), tokens(3, 6, seed=2)
    _, _, logged = _criterion()(model, _sample(source, target))
    largest = model(source)[1]["spectral_radii"].largest()
    assert logged["sradius_rows"] == 3
    assert _means(logged)["sradius"] == pytest.approx(largest.mean().item(), abs=1e-4)
    assert largest.min() > 0.01


def test_samples_where_f_is_not_finite_are_counted_and_named(caplog):
    model = build(dtype=torch.float32, f_eps=1e-3)
    source = tokens(4, 6)
    source[source == 10] = 11
    source[2] = 10
    with torch.no_grad():
        model.decoder.embed_tokens.weight[10] = float("nan")
        sample = _sample(source, tokens(4, 6, seed=2)) | {"id": torch.tensor([20, 21, 22, 23])}
        _, _, logged = _criterion()(model, sample)
    assert logged["f_nonfinite_sum"] == 6
    assert "f is not finite at 6 positions, in the samples 22:" in caplog.text
    with metrics.aggregate() as aggregated:
        _criterion().reduce_metrics([logged, logged])
    assert aggregated.get_smoothed_values()["f_nonfinite"] == 12


def test_where_f_is_finite_nothing_is_said(caplog):
    with torch.no_grad():
        _, _, logged = _criterion()(build(), _sample(tokens(2, 6), tokens(2, 6, seed=2)))
    assert logged["f_nonfinite_sum"] == 0
    with metrics.aggregate() as aggregated:
        _criterion().reduce_metrics([logged])
    assert "f_nonfinite" not in aggregated.get_smoothed_values()
    assert caplog.text == ""
