"""Initial weights are what the options say, weight norm or not."""

import pytest
import torch

from fairseq_deq.layers.weight_norm import Initializer, WeightNormLinear


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize(
    ("name", "spread"), [("normal", 0.03), ("uniform", 0.2 / 3**0.5), ("fan_in", 64**-0.5 / 3**0.5)]
)
def test_initial_weight_has_the_spread_asked_for(name, spread, weight_norm):
    torch.manual_seed(0)
    linear = WeightNormLinear(64, 512, bias=False, weight_norm=weight_norm)
    linear.initialize(Initializer(name, std=0.03, range=0.2))
    assert linear.weight().std().item() == pytest.approx(spread, rel=0.02)
    assert torch.allclose(linear.weight(), linear.weight_v)


def test_weight_is_gain_times_direction():
    linear = WeightNormLinear(3, 2, bias=False, weight_norm=True)
    linear.initialize(Initializer("normal", 1.0, 1.0))
    with torch.no_grad():
        linear.weight_g.copy_(torch.tensor([[2.0], [5.0]]))
        linear.weight_v.mul_(7.0)
    assert torch.allclose(linear.weight().norm(dim=1), torch.tensor([2.0, 5.0]))


def test_gradient_reaches_gain_and_direction():
    linear = WeightNormLinear(3, 2, bias=False, weight_norm=True).double()
    linear.initialize(Initializer("normal", 1.0, 1.0))
    g, v = linear.weight_g, linear.weight_v
    assert torch.autograd.gradcheck(lambda g, v: torch._weight_norm(v, g, 0), (g, v))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("xavier", 1.0, 1.0), "--init must be one of"), (("normal", 0.0, 1.0), "--init-std must be above 0")],
)
def test_options_are_refused_by_name(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Initializer(*arguments)
