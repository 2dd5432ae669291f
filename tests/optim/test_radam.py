"""RAdam under fairseq's trainer is torch's, by the formula of its paper, and resumes exactly."""

import math

import pytest
import torch
from fairseq.optim import build_optimizer
from omegaconf import OmegaConf

import fairseq_deq  # noqa: F401  (registers the optimizer)


def _radam(parameter, **options):
    cfg = {"_name": "radam", "lr": [0.1], "radam_betas": "(0.9, 0.99)", "radam_eps": 1e-8}
    return build_optimizer(OmegaConf.create(cfg | {"weight_decay": 0.0} | options), [parameter])


def test_its_steps_are_those_of_the_paper():
    """Liu et al. (2020), algorithm 2: momentum alone while the variance is intractable, then rectified."""
    beta1, beta2, lr = 0.9, 0.99, 0.1
    gradients = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = _radam(parameter)
    theta = m = v = 0.0
    longest = 2 / (1 - beta2) - 1
    rectified = 0
    for t, g in enumerate(gradients.tolist(), 1):
        parameter.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        momentum = m / (1 - beta1**t)
        rho = longest - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            rectified += 1
            r = math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
            theta -= lr * r * momentum / math.sqrt(v / (1 - beta2**t))
        else:
            theta -= lr * momentum
        assert parameter.item() == pytest.approx(theta, rel=1e-5)
    assert 0 < rectified < 30


def test_weight_decay_is_decoupled():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = _radam(parameter, weight_decay=0.5)
    parameter.grad = torch.zeros(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 * 0.5)


def _weights(path):
    state = torch.load(path, weights_only=False)["model"]
    return {name: tensor for name, tensor in state.items() if "_float_tensor" not in name}


def test_a_resumed_run_is_the_uninterrupted_one(in_process, deq_training, tmp_path):
    options = (*deq_training, "--optimizer", "radam", "--weight-decay", "0.01", "--disable-validation")
    in_process("fairseq-train", *options, "--max-update", "10", "--save-dir", tmp_path / "whole").checked()
    in_process("fairseq-train", *options, "--max-update", "6", "--save-dir", tmp_path / "parts").checked()
    in_process("fairseq-train", *options, "--max-update", "10", "--save-dir", tmp_path / "parts").checked()
    whole = _weights(tmp_path / "whole" / "checkpoint_last.pt")
    parts = _weights(tmp_path / "parts" / "checkpoint_last.pt")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--radam-betas 0.9", "--radam-betas must be two numbers in [0, 1), like '(0.9, 0.999)'; got 0.9"),
        ("--radam-betas (0.9,1.5)", "--radam-betas must be two numbers in [0, 1)"),
        ("--radam-eps -1", "--radam-eps must be above 0, got -1.0"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, refused, deq_training):
    training = (*deq_training, "--optimizer", "radam", "--no-save", *options.split())
    assert sentence in refused("fairseq-train", *training).text
