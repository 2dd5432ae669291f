"""The penalty on the Jacobian, its schedule, and the spectral radius, against dense Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from problems import CausalMap

from fairseq_deq.jacobian import PenaltySchedule, jacobian_penalty, spectral_radius
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.trellis.layer import TrellisLayer
from fairseq_deq.layers.weight_norm import Initializer

B, T, C = 2, 4, 6


def _transformer(pre_norm: bool = False, weight_norm: bool = True):
    """f of a causal layer, a point, and the parameters."""
    torch.manual_seed(0)
    cell = TransformerLayer(
        dim=C,
        ffn_dim=8,
        heads=2,
        head_dim=3,
        pre_norm=pre_norm,
        weight_norm=weight_norm,
        dropout=0.0,
        attention_dropout=0.0,
        local_size=0,
    )
    return _bound(cell.double())


def _trellis(weight_norm: bool = True):
    torch.manual_seed(0)
    return _bound(TrellisLayer(3, 2, 2, weight_norm, dropout=0.0, weight_dropout=0.0).double())


def _bound(cell):
    cell.initialize(Initializer("normal", 0.6, 1.0))
    u = torch.randn(B, T, cell.injection_dim, dtype=torch.float64)
    z = torch.randn(B, T, C, dtype=torch.float64)
    return lambda: cell.prepare(cell.draw(B, T, 0, u)).bind(u, None), z, dict(cell.named_parameters())


LAYERS = {
    "post-norm": lambda: _transformer(weight_norm=False),
    "post-norm, weight norm": _transformer,
    "pre-norm": lambda: _transformer(pre_norm=True, weight_norm=False),
    "pre-norm, weight norm": lambda: _transformer(pre_norm=True),
    "trellis": lambda: _trellis(weight_norm=False),
    "trellis, weight norm": _trellis,
}


def _penalty(bind, z, seed: int = 3, **options):
    torch.manual_seed(seed)
    leaf = z.clone().requires_grad_()
    return jacobian_penalty(bind()(leaf), leaf, **options)


def _dense(f, z):
    """df/dz, (n, n), n the numbers in z, with its graph."""
    return torch.autograd.functional.jacobian(f, z, create_graph=True).reshape(z.numel(), z.numel())


# ---------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("layer", LAYERS)
def test_the_penalty_and_its_gradient_are_those_of_a_dense_jacobian(layer):
    bind, z, parameters = LAYERS[layer]()
    penalty = _penalty(bind, z)
    torch.manual_seed(3)
    v = torch.randn_like(z).flatten()
    expected = (v @ _dense(bind(), z)).square().mean()
    assert torch.allclose(penalty, expected, rtol=1e-12)
    found = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    nonzero = 0
    for name, a, b in zip(parameters, found, wanted):
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name
            nonzero += bool(a.norm() > 1e-6)
    assert nonzero >= len(parameters) // 2


@pytest.mark.parametrize("layer", ["post-norm, weight norm", "pre-norm", "trellis, weight norm"])
def test_the_gradient_of_the_penalty_is_its_finite_difference(layer):
    bind, z, parameters = LAYERS[layer]()
    names = list(parameters)
    gradients = torch.autograd.grad(_penalty(bind, z), list(parameters.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(5)
    for name, gradient in zip(names, gradients):
        parameter = parameters[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            values.append(_penalty(bind, z).item())
            with torch.no_grad():
                parameter.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        found = 0.0 if gradient is None else float((gradient * direction).sum())
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_the_penalty_is_in_the_mean_the_squared_frobenius_norm():
    bind, z, _ = _transformer()
    expected = _dense(bind(), z).square().sum() / z.numel()
    assert _penalty(bind, z, probes=500).item() == pytest.approx(expected.item(), rel=0.05)


def test_positions_that_are_padding_count_neither_in_the_jacobian_nor_in_the_mean():
    bind, z, _ = _transformer()
    real = torch.tensor([[True] * T, [True] * 2 + [False] * 2])
    jacobian = _dense(bind(), z).detach()
    rows = real.unsqueeze(-1).expand_as(z).flatten()
    torch.manual_seed(3)
    v = torch.randn_like(z).flatten()[rows]
    expected = (v @ jacobian[rows][:, rows]).square().sum() / rows.sum()
    assert torch.allclose(_penalty(bind, z, real=real), expected, rtol=1e-12)
    assert _penalty(bind, z, real=torch.zeros_like(real)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_penalty_of_a_half_is_summed_in_float32(dtype):
    leaf = torch.zeros(4, 512, 64, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    penalty = jacobian_penalty(0.5 * leaf, leaf)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(0.25, rel=0.02)


def test_the_penalty_under_autocast_is_that_without():
    def gradient(autocast: bool):
        weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        leaf = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            fz = torch.tanh(leaf @ weight.T) @ weight
            torch.manual_seed(3)
            penalty = jacobian_penalty(fz.float(), leaf)
        assert penalty.dtype == torch.float32
        return penalty.item(), torch.autograd.grad(penalty, weight)[0]

    (rounded, rounded_gradient), (plain, plain_gradient) = gradient(True), gradient(False)
    assert rounded == pytest.approx(plain, rel=0.03)
    assert (rounded_gradient - plain_gradient).norm() < 0.05 * plain_gradient.norm()


def test_what_the_penalty_needs_is_said():
    z = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="a z that requires a gradient"):
        jacobian_penalty(z, z)
    leaf = z.requires_grad_()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        jacobian_penalty(2 * leaf, leaf, probes=0)


# ---------------------------------------------------------------------- its schedule


def test_the_weight_grows_by_a_tenth_from_the_start_on():
    schedule = PenaltySchedule(0.5, increment_every=10, start=100)
    weights = [schedule.at(update) for update in (0, 99, 100, 109, 110, 129, 130)]
    assert weights == pytest.approx([0, 0, 0.5, 0.5, 0.6, 0.7, 0.8])
    assert PenaltySchedule(0.5).at(10**6) == 0.5
    growing = PenaltySchedule(increment_every=10)
    assert [growing.at(9), growing.at(10)] == pytest.approx([0.0, 0.1])


def test_a_share_of_the_updates_has_the_penalty_and_a_resumed_run_the_same_ones():
    schedule = PenaltySchedule(1.0, frequency=0.3)
    drawn = [schedule.at(update) for update in range(4000)]
    torch.manual_seed(7)  # the state of the generators that a run shares does not matter
    again = PenaltySchedule(1.0, frequency=0.3)
    assert [again.at(update) for update in range(2000, 4000)] == drawn[2000:]
    assert sum(drawn) == pytest.approx(1200, abs=90)  # 3 standard deviations
    assert 0 < sum(drawn[:50]) < 30
    assert not any(PenaltySchedule(1.0, frequency=0.0).at(update) for update in range(50))


def test_drawing_the_lot_leaves_the_common_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    PenaltySchedule(1.0, frequency=0.5).at(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": -1.0}, "weight must be finite and at least 0"),
        ({"weight": math.nan}, "weight must be finite and at least 0"),
        ({"frequency": 1.5}, r"frequency must be in \[0, 1\]"),
        ({"increment_every": -1}, "increment_every must be at least 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PenaltySchedule(**options)


# ---------------------------------------------------------------------- the spectral radius


def _linear(matrix):
    return lambda z: z @ matrix.T


def _radius(matrix, steps, **options):
    z = torch.zeros(1, matrix.shape[0], dtype=matrix.dtype)
    return spectral_radius(_linear(matrix), z, "sample", steps, **options)


def _jordan(eigenvalue: float, size: int):
    ones = torch.ones(size - 1, dtype=torch.float64)
    return eigenvalue * torch.eye(size, dtype=torch.float64) + torch.diag(ones, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_rotation_has_its_radius(dtype):
    rotation = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=dtype)
    radius = _radius(rotation, 2)
    exact = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert radius.value.item() == pytest.approx(0.9, rel=exact)
    assert radius.error.item() <= exact
    assert radius.value.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_non_normal_triangular_matrices_are_exact_with_as_many_steps_as_dimensions():
    generator = torch.Generator().manual_seed(0)
    for size in (3, 6, 10):
        diagonal = torch.linspace(-0.7, 0.3, size, dtype=torch.float64)
        upper = 5 * torch.randn(size, size, generator=generator, dtype=torch.float64).triu(1)
        radius = _radius(upper + torch.diag(diagonal), size + 3)
        assert radius.steps == size
        assert radius.value.item() == pytest.approx(0.7, rel=1e-4)
        assert radius.error.item() < 1e-9


@pytest.mark.parametrize("eigenvalue", [0.0, 0.5, -0.8])
def test_a_defective_block_has_its_one_eigenvalue(eigenvalue):
    """Rounding moves the eigenvalue of a block of 4 by eps**(1/4); the backward error stays at eps."""
    radius = _radius(_jordan(eigenvalue, 4), 4)
    assert radius.value.item() == pytest.approx(abs(eigenvalue), abs=1e-3)
    assert radius.error.item() < 1e-12


def test_random_matrices_have_their_radius_within_the_error():
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(30, 30, generator=generator, dtype=torch.float64) / 30**0.5
        true = torch.linalg.eigvals(matrix)
        for steps in (10, 20, 30):
            radius = _radius(matrix, steps)
            # The matrix is at most `error` away from one with an eigenvalue of that size.
            assert _distance_to_modulus(matrix, radius.value.item()) <= radius.error.item() + 1e-9
            if steps == 30:
                assert radius.value.item() == pytest.approx(true.abs().max().item(), rel=1e-9)
        symmetric = (matrix + matrix.T) / 2
        radius = _radius(symmetric, 12)
        eigenvalues = torch.linalg.eigvalsh(symmetric)
        assert (eigenvalues.abs() - radius.value).abs().min() <= radius.error + 1e-12
        assert radius.value <= eigenvalues.abs().max() + 1e-12


def _distance_to_modulus(matrix, modulus: float) -> float:
    """min over |lambda| = modulus of sigma_min(A - lambda): how near a matrix with that eigenvalue is."""
    angle = torch.linspace(0, math.pi, 181, dtype=torch.float64)
    shift = torch.polar(torch.full_like(angle, modulus), angle)
    eye = torch.eye(matrix.shape[0], dtype=torch.complex128)
    smallest = torch.linalg.svdvals(matrix - shift.view(-1, 1, 1) * eye)[:, -1].min().item()
    return smallest - modulus * math.pi / 360  # half the gap of two angles of the grid


@pytest.mark.parametrize("layer", LAYERS)
def test_block_radii_of_a_causal_layer_are_those_of_the_dense_jacobian(layer):
    bind, z, _ = LAYERS[layer]()
    f = bind()
    radius = spectral_radius(f, z, steps=C)
    assert radius.value.shape == (B, T)
    whole = _dense(f, z).detach().view(B, T, C, B, T, C)
    for b in range(B):
        blocks = [torch.linalg.eigvals(whole[b, t, :, b, t]).abs().max() for t in range(T)]
        assert torch.allclose(radius.value[b], torch.stack(blocks), rtol=1e-6)
        # The spectrum of the sample is the union of those of its blocks.
        sample = torch.linalg.eigvals(whole[b, :, :, b].reshape(T * C, T * C)).abs().max()
        assert radius.value[b].max().item() == pytest.approx(sample.item(), rel=1e-6)
    assert radius.error.max() < 1e-9
    assert radius.value.std() > 1e-3  # positions differ, so one could not pass for another


def test_blocks_can_be_chosen():
    bind, z, _ = _transformer()
    every = spectral_radius(bind(), z, steps=C).value
    chosen = torch.tensor([[3, 1], [0, 2]])
    radius = spectral_radius(bind(), z, steps=C, positions=chosen)
    assert torch.allclose(radius.value, every.gather(1, chosen), rtol=1e-12)


def test_blocks_of_a_map_that_is_evaluated_at_all_positions_only_are_the_same():
    bind, z, _ = _transformer()
    f = bind()
    whole = spectral_radius(lambda z: f(z), z, steps=C)
    assert torch.allclose(whole.value, spectral_radius(f, z, steps=C).value, rtol=1e-9)


def test_a_sample_in_full_needs_more_steps_and_comes_to_the_same():
    f = CausalMap(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    z = torch.zeros(2, 5, 3, dtype=torch.float64)
    blocks = spectral_radius(f, z, steps=3).value.amax(1)
    sample = spectral_radius(f, z, "sample", steps=15)
    # The eigenvalues of the blocks are alike, so that those of the whole are nearly defective.
    assert torch.allclose(sample.value, blocks, rtol=0.1)
    assert sample.error.max() < 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_has_no_radius_and_spoils_no_other(bad):
    matrix = torch.diag(torch.tensor([0.5, 0.25, 0.125]))
    factor = torch.tensor([[1.0], [bad]])
    radius = spectral_radius(lambda z: factor * (z @ matrix), torch.ones(2, 3), "sample", 3)
    assert radius.value[0].item() == pytest.approx(0.5, rel=1e-4)
    assert torch.isnan(radius.value[1])
    assert torch.isnan(radius.error[1])


def test_a_constant_has_radius_zero():
    radius = spectral_radius(lambda z: torch.ones_like(z), torch.zeros(2, 3), steps=2)
    assert radius.value.tolist() == radius.error.tolist() == [0.0, 0.0]


def test_the_point_is_left_without_a_gradient_and_no_grad_is_no_hindrance():
    z = torch.ones(1, 2, requires_grad=True)
    with torch.no_grad():
        radius = spectral_radius(torch.sin, z, steps=2)
    assert not radius.value.requires_grad
    assert radius.value.item() == pytest.approx(math.cos(1.0), rel=1e-5)
    assert z.grad is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scope": "batch"}, "scope must be one of position, sample"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"scope": "sample", "positions": torch.zeros(1, 1)}, "positions can be chosen in scope position"),
    ],
)
def test_what_a_radius_cannot_be_of_is_said(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        spectral_radius(torch.cos, torch.zeros(2, 3, 4), **options)
