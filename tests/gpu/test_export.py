"""An exported model on a device."""

import pytest
import torch
from export.small import scores, small
from models.builders import tokens

pytestmark = pytest.mark.gpu

FAMILIES = {
    "transformer": {"teach": True, "adaptive_softmax_cutoff": "10,20"},
    "trellisnet": {"teach": True, "adaptive_input": "true", "adaptive_input_cutoff": "10,20"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_cpu(tmp_path, device, family):
    decoder = small(tmp_path, family, **FAMILIES[family], f_eps=1e-10, f_thres=400).exported().double()
    source = tokens(3, 21)
    source[0, 15:] = source[1, :4] = 1  # padding
    real = source.ne(1)
    expected, _ = scores(decoder, source, real)
    found, cache = scores(decoder.to(device), source.to(device), real.to(device), steps=(8, 9, 10))
    assert found.device.type == torch.device(device).type
    assert (found.cpu() - expected)[real].abs().max() < 1e-6
    assert cache.converged_share == 1.0
