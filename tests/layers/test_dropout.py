"""Variational dropout: scaled masks, drawn once."""

import pytest
import torch

from fairseq_deq.layers.dropout import apply_mask, variational_mask


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_there_is_no_mask_where_nothing_is_dropped(p, training):
    assert variational_mask(torch.zeros(1), (2, 3), p, training) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_has_the_rate_asked_for_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    mask = variational_mask(torch.zeros(1, dtype=dtype), (200, 200), 0.25, True)
    assert mask is not None
    assert mask.dtype == dtype
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert mask.float().mean().item() == pytest.approx(1.0, abs=0.02)
    assert mask.unique().numel() == 2


def test_no_mask_changes_nothing():
    x = torch.randn(3)
    assert apply_mask(x, None) is x
