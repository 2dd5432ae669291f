"""The activations: equal to torch's, and the same for an element wherever it stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fairseq_deq.layers.transformer.activation import ACTIVATIONS, Activation

TORCH = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
FORMS = [(name, gated) for name in ACTIVATIONS for gated in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_those_of_torch_far_out_as_well(name, dtype):
    x = torch.cat([torch.linspace(-30, 30, 999), torch.tensor([-1e30, 1e30])]).to(dtype).view(7, 143)
    found = Activation(name)(x.clone())
    eps = torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found, TORCH[name](x.double()).to(dtype), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "gated"), FORMS)
def test_an_element_is_the_same_in_any_matrix(name, gated, dtype, threads):
    """torch's own gelu and silu are not, on a CPU."""
    activation, before = Activation(name, gated), torch.get_num_threads()
    x = torch.randn(701, 2 * 53, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(2)
    torch.set_num_threads(threads)
    try:
        whole, (value, slopes) = activation(x.clone()), activation.at(x.clone())
        for begin, end in ((0, 1), (1, 4), (7, 20), (5, 338), (600, 701)):
            assert torch.equal(activation(x[begin:end].clone()), whole[begin:end])
            parts = activation.at(x[begin:end].clone())
            assert torch.equal(parts[0], value[begin:end])
            assert torch.equal(parts[1], slopes[begin:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "gated"), FORMS)
def test_the_graph_changes_no_value_and_slopes_are_those_of_autograd(name, gated):
    activation = Activation(name, gated)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 14, generator=generator, dtype=torch.float64).mul(2)
    leaf = x.clone().requires_grad_()
    with_graph = activation(leaf * 1)
    with torch.no_grad():
        assert torch.equal(with_graph, activation(x.clone()))
        value, slopes = activation.at(x.clone())
    grad = torch.randn(*value.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(with_graph, leaf, grad)
    assert torch.allclose(value, with_graph, rtol=1e-14)
    assert torch.allclose(activation.transposed(grad, slopes), expected, atol=1e-13)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu; got 'tanh'"):
        Activation("tanh")
