"""The mean of the blocks dz'_t/dz_t, from a few probes, against dense Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from problems import Neighbours, block_mean

from fairseq_deq.jacobian import JacobianSums


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _layer(batch: int, length: int, width: int = 4, act=torch.tanh) -> tuple[Neighbours, torch.Tensor]:
    """The layer, and a point; own blocks and those of the neighbour are as large, and not symmetric."""
    own, before = (1.5 * _draw(width, width, seed=s) / width**0.5 for s in (1, 2))
    return Neighbours(_draw(batch, length, width, seed=3), own, before, act), _draw(
        batch, length, width, seed=4
    )


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def test_of_a_nonlinear_layer_it_is_the_mean_of_the_blocks_to_the_noise_of_sampling():
    f, z = _layer(64, 16)
    blocks = f.blocks(z).flatten(0, 1)
    mean = block_mean(f, z)
    sums = JacobianSums.probed(f, z, 4)
    assert sums.positions == 2 * 2 * 2 * 64  # twice, at every eighth position and half-way between
    # A sample is df = J_t d: what J_t - Jbar contributes averages out as 1/sqrt(samples); 4 entries add up.
    noise = 2 * float(blocks.std(0).max()) / math.sqrt(float(sums.positions))
    found = sums.mean_jacobian()
    assert (found - mean).abs().max() < 5 * noise < 0.25
    assert (found - mean.T).norm() > 4 * (found - mean).norm()
    assert (found - f.own).norm() > (found - mean).norm() * 3  # tanh is not its slope at zero


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 17])
def test_of_an_affine_layer_it_is_exact_up_to_the_ridge(length):
    f, z = _layer(24, length, act=_identity)
    sums = JacobianSums.probed(f, z, 4)
    assert torch.allclose(sums.cross, sums.gram @ f.own.T, rtol=1e-8, atol=1e-12 * float(sums.gram.max()))
    assert (sums.mean_jacobian() - f.own).norm() < 4e-3 * f.own.norm()


def test_fewer_samples_than_channels_are_right_where_they_look():
    f, z = _layer(1, 4, width=32, act=_identity)
    found = JacobianSums.probed(f, z, 32).mean_jacobian()
    assert torch.isfinite(found).all()
    assert torch.linalg.matrix_norm(found, 2) <= 1.01 * torch.linalg.matrix_norm(f.own, 2)
    sums = JacobianSums.probed(f, z, 32)
    _, directions = torch.linalg.eigh(sums.gram)
    seen = directions[:, -4:]  # four changes were made in all
    assert torch.allclose(found @ seen, f.own @ seen, rtol=0.3, atol=0.2)
    assert (found @ directions[:, :20]).norm() < 1e-6


def test_leading_channels_alone_are_looked_at():
    f, z = _layer(32, 8, width=6, act=_identity)
    found = JacobianSums.probed(f, z, 4).mean_jacobian()
    assert found.shape == (4, 4)
    assert (found - f.own[:4, :4]).norm() < 4e-3 * f.own.norm()


def test_five_evaluations_at_most_and_nothing_is_left_behind():
    f, z = _layer(2, 24)
    z.requires_grad_()
    before, state = z.detach().clone(), torch.random.get_rng_state()
    sums = JacobianSums.probed(f, z, 4)
    assert f.evaluations == 5
    assert torch.equal(z, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not sums.gram.requires_grad
    assert not sums.cross.requires_grad


def test_the_seed_decides():
    f, z = _layer(2, 24)
    torch.manual_seed(1)
    first = JacobianSums.probed(f, z, 4, seed=7)
    torch.manual_seed(2)
    again, other = JacobianSums.probed(f, z, 4, seed=7), JacobianSums.probed(f, z, 4, seed=8)
    assert torch.equal(first.gram, again.gram)
    assert torch.equal(first.cross, again.cross)
    assert not torch.allclose(first.gram, other.gram)


def test_a_change_is_small_beside_the_state_and_as_long_as_asked_for():
    f, z = _layer(64, 16)
    for length in (1e-2, 1e-1):
        sums = JacobianSums.probed(f, z, 4, length=length)
        square = float(z[:, ::4].square().sum()) * 2
        assert float(sums.gram.trace()) == pytest.approx(length**2 * square, rel=0.2)


def test_positions_that_are_not_real_do_not_count():
    f, z = _layer(6, 16, act=_identity)
    real = torch.ones(6, 16, dtype=torch.bool)
    real[0] = real[3, 5:] = False

    def padded(x):
        return torch.where(real.unsqueeze(-1), f(x), 100 * x)

    expected, found = JacobianSums.probed(f, z, 4, real), JacobianSums.probed(padded, z, 4, real)
    assert torch.equal(found.gram, expected.gram)
    assert torch.equal(found.cross, expected.cross)
    assert found.positions < JacobianSums.probed(f, z, 4).positions
    assert (found.mean_jacobian() - f.own).norm() < 1e-2 * f.own.norm()
    assert (JacobianSums.probed(padded, z, 4).mean_jacobian() - f.own).norm() > f.own.norm()


def test_where_f_is_not_finite_nothing_is_learned():
    f, z = _layer(6, 16, act=_identity)
    spoilt = torch.zeros(6, 16, 1, dtype=torch.float64)
    spoilt[2] = math.nan
    real = torch.ones(6, 16, dtype=torch.bool)
    real[2] = False
    expected = JacobianSums.probed(f, z, 4, real)
    found = JacobianSums.probed(lambda x: f(x) + spoilt, z, 4)
    assert torch.equal(found.gram, expected.gram)
    assert torch.equal(found.cross, expected.cross)
    assert found.positions == expected.positions  # no more than what was learned from


def test_nothing_real_is_no_jacobian():
    f, z = _layer(2, 8)
    sums = JacobianSums.probed(f, z, 4, torch.zeros(2, 8, dtype=torch.bool))
    assert not sums.gram.any()
    assert sums.positions == 0
    sums.mean_jacobian()  # whatever it is, it is no error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-3), (torch.bfloat16, 0.5)])
def test_the_sums_are_float64_for_any_state(dtype, error):
    f, z = _layer(64, 16, act=_identity)
    f.own, f.before, f.u = f.own.to(dtype), f.before.to(dtype), f.u.to(dtype)
    sums = JacobianSums.probed(f, z.to(dtype), 4, length=1e-2 if dtype == torch.float32 else 0.125)
    assert sums.gram.dtype == sums.cross.dtype == torch.float64
    assert (sums.mean_jacobian() - f.own.double()).norm() < error * f.own.double().norm()
