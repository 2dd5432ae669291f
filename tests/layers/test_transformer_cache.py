"""The layer at one new position, in the precisions that f is computed in."""

from __future__ import annotations

import torch

from fairseq_deq.layers.transformer.layer import TransformerLayer
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
