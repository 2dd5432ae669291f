"""Both families on a device: equilibria, gradients, causality, batch mates and decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from models.builders import build, build_trellis, check_causality, decode, features, tokens

FAMILIES = {"transformer": build, "trellis": build_trellis}
FAST = {"f_solver": "anderson", "b_solver": "anderson", "f_thres": 60, "b_thres": 60}


def gradients(model, source):
    torch.manual_seed(0)
    x, _ = model.extract_features(source)
    x.sin().sum().backward()
    return x.detach().cpu(), torch.cat(
        [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"f_solver": "anderson", "b_solver": "anderson"},
        {"f_solver": "broyden", "b_solver": "broyden"},
        {"f_solver": "anderson", "b_solver": "gmres"},
        {"f_solver": "anderson", "b_solver": "anderson", "gradient": "phantom"},
        {"f_solver": "anderson", "b_solver": "anderson", "gradient": "jfb"},
        {"f_solver": "anderson", "b_solver": "anderson", "active_set": "always"},
        {"f_solver": "anderson", "b_solver": "anderson", "active_set": "never"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float64_are_those_of_a_cpu(family, options, request):
    model = FAMILIES[family](**options).train()
    other, source = copy.deepcopy(model), tokens(3, 14)
    x, expected = gradients(model, source)  # before books are forced
    device = request.getfixturevalue("device")
    on_device, found = gradients(other.to(device), source.to(device))
    torch.testing.assert_close(on_device, x, rtol=1e-6, atol=1e-7)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("budget", [1, 7, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_causality_is_bitwise(family, budget, device, monkeypatch):
    options = FAST | {"f_thres": budget, "f_eps": 1e-3, "init_std": 0.2 if family == "transformer" else 0.4}
    model = FAMILIES[family](dtype=torch.float32, **options).to(device)
    monkeypatch.setattr("models.builders.tokens", lambda *args: tokens(*args).to(device))
    check_causality(model, budget)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_do_not_matter(family, device):
    """Bitwise on a CPU. A GPU's kernels are chosen by the shape, and round differently: what is left at
    convergence is of the order of the tolerance."""
    model = FAMILIES[family](dtype=torch.float32, **FAST, f_eps=1e-5).to(device)
    source = tokens(8, 40).to(device)
    whole, alone = features(model, source), features(model, source[:1])
    if device.type == "cpu":
        assert torch.equal(alone, whole[:1])
    else:
        assert float((alone - whole[:1]).norm() / whole[:1].norm()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_teacher_forcing(family, device):
    model = FAMILIES[family](**FAST, f_eps=1e-9).to(device)
    source = tokens(3, 14).to(device)
    with torch.no_grad():
        whole = model(source)[0]
    found, _ = decode(model, source, 5)
    torch.testing.assert_close(found, whole[:, 4:], rtol=1e-5, atol=1e-6)
    found, source = decode(model, source, 5, reorder=lambda end: torch.tensor([1, 0, 2], device=device))
    with torch.no_grad():
        whole = model(source)[0]
    torch.testing.assert_close(found[:, -1], whole[:, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_stays_near_float32(family, low, device):
    model = FAMILIES[family](dtype=torch.float32, **FAST, f_eps=1e-3, b_eps=1e-3).to(device).train()
    source = tokens(4, 24).to(device)
    _, expected = gradients(copy.deepcopy(model), source)
    with torch.autocast(device.type, low):
        _, found = gradients(model, source)
    assert float((found - expected).norm() / expected.norm()) < 0.15
