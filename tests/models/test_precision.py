"""Low precision: solves stop where rounding lets them, and training goes on."""

from __future__ import annotations

import pytest
import torch
from models.builders import build, tokens
from runs import json_lines

from fairseq_deq.models.deq_decoder import DEQDecoder
from fairseq_deq.models.precision import clamp_tolerance
from fairseq_deq.solvers import SolverConfig


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 2**-23)]
)
def test_a_tolerance_below_what_rounding_leaves_is_raised_to_it(dtype, eps):
    like = torch.zeros(1, dtype=dtype)
    assert clamp_tolerance(SolverConfig(rtol=1e-9, atol=0.0), like).rtol == eps
    assert clamp_tolerance(SolverConfig(rtol=0.0, atol=1e-9), like).atol == eps
    coarse = SolverConfig(rtol=0.1)
    assert clamp_tolerance(coarse, like) is coarse


def test_autocast_counts_as_the_precision_of_f():
    config, like = SolverConfig(rtol=1e-3), torch.zeros(1)
    assert clamp_tolerance(config, like) is config
    with torch.autocast("cpu", torch.bfloat16):
        assert clamp_tolerance(config, like).rtol == 2**-7
        assert clamp_tolerance(config, like.double()) is config  # autocast leaves float64 alone


def _trained(model, source, low):
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logits, extra = model(source)
        loss = -logits.float().log_softmax(-1).gather(-1, source.unsqueeze(-1)).mean()
    loss.backward()  # outside of autocast, as usual
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    shares = [
        (extra[f"{way}_stats"].sums[4] / extra[f"{way}_stats"].sums[0]).item()
        for way in ("forward", "backward")
    ]
    return gradient, shares


def test_bfloat16_autocast_converges_and_has_nearly_the_gradient_of_float32():
    options = {
        "f_solver": "anderson",
        "b_solver": "anderson",
        "f_eps": 1e-3,
        "b_eps": 1e-3,
        "f_thres": 40,
        "b_thres": 40,
    }
    source = tokens(4, 48)
    full, _ = _trained(build(1, torch.float32, **options).train(), source, low=False)
    low, shares = _trained(build(1, torch.float32, **options).train(), source, low=True)
    assert min(shares) > 0.95
    assert (low - full).norm() < 0.1 * full.norm()


@pytest.fixture
def precisions(monkeypatch):
    """The types that forward passes compute in."""
    seen = set()
    forward = DEQDecoder.forward

    def recording(self, *args, **kwargs):
        low = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if low else self.injection.weight.dtype)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DEQDecoder, "forward", recording)
    return seen


@pytest.mark.parametrize("option", ["--amp", "--bf16"])
def test_training_in_bfloat16_on_a_cpu(option, precisions, in_process, deq_training, tmp_path):
    options = ("--save-dir", tmp_path, "--disable-validation", "--f-thres", "30", "--b-thres", "30")
    log = in_process(
        "fairseq-train", *deq_training, option, *options, "--log-format", "json", "--log-interval", "1"
    )
    assert precisions == {torch.bfloat16}
    lines = [line for line in json_lines(log.text) if "f_conv" in line]
    assert len(lines) >= 3
    assert float(lines[-1]["f_conv"]) > 0.7
    assert float(lines[-1]["b_conv"]) > 0.9
    weights = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    assert all(torch.isfinite(w).all() for w in weights.values())
