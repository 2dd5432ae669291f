"""The layer at one new position: in the precisions that f is computed in, and with unused columns."""

from __future__ import annotations

import pytest
import torch

from fairseq_deq.layers.transformer import cache as cache_module
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.token import RecordableToken
from fairseq_deq.layers.weight_norm import Initializer

B, S, C, HEADS, D = 3, 9, 16, 2, 8


@torch.no_grad()
def test_autocast_rounds_the_products_of_a_new_position():
    torch.manual_seed(0)
    cell = TransformerLayer(C, 32, HEADS, D, False, False, 0.0, 0.0, 0).eval()
    cell.initialize(Initializer("normal", 0.2, 1.0))
    prepared = cell.prepare(cell.draw(B, S, 0, cell.content_bias))
    cache = prepared.new_cache(B)
    injection = torch.randn(B, S + 1, 3 * HEADS * D)
    cache.append(torch.randn(B, S, C), injection[:, :S])
    f, z = cache.bind(injection[:, S:], None), torch.randn(B, 1, C)
    exact = f(z)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = f(z)
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 2**-6


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("length", [0, 9, 63, 64, 130])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_unused_columns_change_nothing(length, positions, padded, monkeypatch):
    """Off the CPU the columns are a multiple of 64, so that f has the same shapes for up to 64 tokens."""
    torch.manual_seed(length)
    layer = TransformerLayer(C, 32, HEADS, D, False, False, 0.0, 0.0, 0, positions=positions).double().eval()
    layer.initialize(Initializer("normal", 0.2, 1.0))
    for bias in (layer.content_bias, layer.position_bias):
        if bias is not None:
            bias.normal_()
    prepared = layer.prepare(layer.draw(B, length, 0, layer.out.bias))
    cache = prepared.new_cache(B)
    injection = torch.randn(B, length + 1, 3 * HEADS * D, dtype=torch.float64)
    if length:
        cache.append(torch.randn(B, length, C, dtype=torch.float64), injection[:, :length])
    padding = None
    if padded:
        padding = torch.arange(length + 1) < torch.tensor([[0], [length // 3], [length]])
    z = torch.randn(B, 1, C, dtype=torch.float64)
    expected = cache.bind(injection[:, length:], padding)(z)
    monkeypatch.setattr(cache_module, "fills_windows", lambda device: True)
    f = cache.bind(injection[:, length:], padding)
    assert isinstance(f, RecordableToken)
    assert f.keys.shape[-1] % 64 == 0
    for _ in range(2):  # the first evaluation writes its key and value
        torch.testing.assert_close(f(z), expected, rtol=1e-12, atol=1e-12)
    later = torch.randn(B, 1, 3 * HEADS * D, dtype=torch.float64)
    cache.append(z, injection[:, length:])
    found = cache.bind(later, None if padding is None else torch.cat([padding, padding[:, :1] & False], 1))
    monkeypatch.setattr(cache_module, "fills_windows", lambda device: False)
    after = cache.bind(later, None if padding is None else torch.cat([padding, padding[:, :1] & False], 1))
    torch.testing.assert_close(found(z), after(z), rtol=1e-12, atol=1e-12)
