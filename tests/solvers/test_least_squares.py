"""Anderson's least squares: the four ways of solving it, and what has no solution."""

import numpy as np
import pytest
import torch

from fairseq_deq.solvers.least_squares import compiled_least_squares, least_squares, stacked_least_squares

RIDGE = 1e-3


def _systems(slots, lanes, seed=0):
    """DG^T DG and DG^T g of random columns whose lengths differ by powers of ten."""
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(lanes, 16, slots)) * 10.0 ** generator.integers(
        -4, 3, size=(lanes, 1, slots)
    )
    g = generator.normal(size=(lanes, 16))
    gram = np.einsum("nki,nkj->ijn", columns, columns)
    return gram, np.einsum("nki,nk->in", columns, g)


def _ridges(slots):
    """One for each column."""
    return RIDGE * 10.0 ** np.arange(slots)


def _expected(gram, rhs, ridges):
    """By a library, one lane after another: (DG^T DG + diag(ridges) * diag) gamma = DG^T g."""
    answers = []
    for n in range(rhs.shape[1]):
        normal = gram[..., n] + np.diag(ridges * np.diag(gram[..., n]))
        answers.append(np.linalg.solve(normal, rhs[:, n]))
    return np.stack(answers, 1)


def _stacked(gram, rhs, ridges, has_ridge=True):
    tensors = torch.from_numpy(gram), torch.from_numpy(rhs), torch.from_numpy(ridges)
    return stacked_least_squares(*tensors, has_ridge).numpy()


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_it_is_the_solution_of_the_normal_equations(slots):
    gram, rhs = _systems(slots, 9)
    gamma = least_squares(gram, rhs, _ridges(len(rhs)), True, range(slots))
    assert np.allclose(gamma, _expected(gram, rhs, _ridges(slots)), rtol=1e-9)
    compiled = compiled_least_squares(
        torch.from_numpy(gram), torch.from_numpy(rhs), torch.from_numpy(_ridges(slots))
    )
    assert np.allclose(compiled.numpy(), gamma, rtol=1e-9)
    assert np.allclose(_stacked(gram, rhs, _ridges(slots)), gamma, rtol=1e-9)


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
@pytest.mark.parametrize("empty", [False, True])
def test_a_lane_alone_is_bitwise_the_lane_beside_others(slots, empty):
    """A lane alone is solved by numbers instead of arrays."""
    gram, rhs = _systems(slots, 33, seed=slots)
    used = range(slots)
    if empty:
        gram[0], gram[:, 0], rhs[0] = 0, 0, 0
        used = range(1, slots)
    together = least_squares(gram, rhs, _ridges(len(rhs)), True, used)
    for n in range(rhs.shape[1]):
        alone = least_squares(
            gram[..., n : n + 1].copy(), rhs[:, n : n + 1].copy(), _ridges(slots), True, used
        )
        assert np.array_equal(alone[:, 0], together[:, n])


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_lane_without_a_solution_has_no_weights_and_spoils_no_other(lanes, spoilt):
    gram, rhs = _systems(4, lanes)
    whole = least_squares(gram, rhs, _ridges(len(rhs)), True, range(4))
    gram[1, 2, 0] = gram[2, 1, 0] = spoilt
    with np.errstate(invalid="ignore"):
        gamma = least_squares(gram, rhs, _ridges(len(rhs)), True, range(4))
    assert not gamma[:, 0].any()
    assert np.array_equal(gamma[:, 1:], whole[:, 1:])
    stacked = _stacked(gram, rhs, _ridges(4))
    assert not stacked[:, 0].any()
    assert np.allclose(stacked[:, 1:], whole[:, 1:], rtol=1e-9)


def test_a_column_that_was_not_taken_yet_has_no_weight():
    gram, rhs = _systems(4, 5)
    gram[1], gram[:, 1], rhs[1] = 0, 0, 0
    stacked = _stacked(gram, rhs, _ridges(4))
    assert not stacked[1].any()
    assert np.allclose(stacked, least_squares(gram, rhs, _ridges(4), True, [0, 2, 3]), rtol=1e-9)


@pytest.mark.parametrize("lanes", [1, 3])
def test_without_a_ridge_a_column_that_the_others_span_has_no_weight(lanes):
    gram, rhs = np.zeros((2, 2, lanes)), np.zeros((2, lanes))
    gram[:], rhs[:] = 4.0, 2.0  # the same column twice: 4 * (gamma_0 + gamma_1) = 2
    gamma = least_squares(gram, rhs, np.zeros(2), False, range(2))
    assert np.array_equal(gamma, np.array([[0.5] * lanes, [0.0] * lanes]))
    assert np.allclose(_stacked(gram, rhs, np.zeros(2), False), gamma, rtol=1e-12)
