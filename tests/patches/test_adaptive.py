"""Adaptive input and softmax train with any criterion, and save nothing random."""

import math

import pytest
import torch
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax

VOCABULARY = 12


@pytest.fixture
def softmax():
    torch.manual_seed(0)
    return AdaptiveSoftmax(VOCABULARY, 8, [4, 8], dropout=0.0)


def test_log_probabilities_can_be_trained(softmax):
    features = torch.randn(2, 3, 8, requires_grad=True)
    log_prob = softmax.get_log_prob(features, None)
    log_prob[..., -1].sum().backward()
    assert features.grad.abs().sum() > 0


def test_log_probabilities_sum_to_one(softmax):
    log_prob = softmax.get_log_prob(torch.randn(2, 3, 8), None)
    torch.testing.assert_close(log_prob.logsumexp(-1), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "target", [None, torch.tensor([[0, 5, 11], [1, 2, 3]]), torch.tensor([[0, 1, 2]] * 2)]
)
def test_log_probabilities_are_what_fairseq_computes(softmax, target):
    features = torch.randn(2, 3, 8)
    original = AdaptiveSoftmax.get_log_prob.__wrapped__
    with torch.no_grad():
        expected = original(softmax, features, target)
        torch.testing.assert_close(softmax.get_log_prob(features, target), expected, rtol=0, atol=0)


def test_cross_entropy_trains_an_adaptive_softmax(in_process, tiny_training, tmp_path):
    options = ("--adaptive-softmax-cutoff", "100,300", "--criterion", "cross_entropy", "--save-dir", tmp_path)
    in_process("fairseq-train", *tiny_training, *options, "--disable-validation", "--no-save")


def test_saved_buffers_hold_no_uninitialised_memory(monkeypatch):
    monkeypatch.setattr(torch, "FloatTensor", lambda *size: torch.full(size, math.nan))
    embedding = AdaptiveInput(VOCABULARY, 1, 32, 2, 32, [4, 8])
    head = AdaptiveSoftmax(VOCABULARY, 32, [4, 8], 0.0, 2, embedding, tie_proj=True)
    buffers = [
        value
        for key, value in [*embedding.state_dict().items(), *head.state_dict().items()]
        if key.endswith("_float_tensor")
    ]
    assert len(buffers) == 2
    assert all(buffer.item() == 0 for buffer in buffers)
