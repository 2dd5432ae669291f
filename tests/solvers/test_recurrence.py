"""Recurrences solved position after position: against dense solves, position by position, and failing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fairseq_deq.implicit import GradientConfig, fixed_point, unroll
from fairseq_deq.solvers import ConvergenceError, SolverConfig, Status, solve

B, T, H, REST = 3, 6, 5, 2
SOLVERS = ("anderson", "broyden", "picard")


class Chain:
    """h_t = act(A h_t + L z_{t-1} + b_t), r_t = M h_t + z_{t-1}'s rest: own channels h, others r; z = (h, r).

    With `backwards` the chain runs from the last position to the first.
    """

    def __init__(self, b: Tensor, gain: float = 0.6, linear: bool = False, backwards: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        own = torch.randn(H, H, generator=generator, dtype=torch.float64)
        self.matrix = (gain * own / torch.linalg.matrix_norm(own, 2)).to(b.dtype)
        self.before = (0.3 * torch.randn(H, H + REST, generator=generator, dtype=torch.float64)).to(b.dtype)
        self.rest = torch.randn(REST, H, generator=generator, dtype=torch.float64).to(b.dtype)
        self.act: Callable[[Tensor], Tensor] = (lambda x: x) if linear else torch.tanh
        self.b, self.backwards = b, backwards
        self.rows = 0

    @property
    def own(self) -> int:
        return H

    @property
    def order(self) -> range:
        return range(T - 1, -1, -1) if self.backwards else range(T)

    def settled_before(self, z: Tensor, t: int) -> Tensor:
        last = t + 1 if self.backwards else t - 1
        return z[:, last] if 0 <= last < T else torch.zeros_like(z[:, 0])

    def start(self, z: Tensor, t: int) -> Tensor:
        return self.settled_before(z, t)[:, :H]

    def column(self, z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        before = self.settled_before(z, t)
        held = self.b[:, t] + _rowwise(before, self.before)

        def f(h: Tensor) -> Tensor:
            self.rows += h.shape[0]
            new = self.act(_rowwise(h, self.matrix) + held)
            return torch.cat([new, _rowwise(h, self.rest) + before[:, H:]], 1)

        return f

    def __call__(self, z: Tensor) -> Tensor:
        return torch.stack([self.column(z, t)(z[:, t, :H]) for t in range(T)], 1)


def _rowwise(z: Tensor, matrix: Tensor) -> Tensor:
    """z @ matrix.T, rounded for each row alone."""
    return (z.unsqueeze(-2) * matrix).sum(-1)


def _b(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _zeros(b: Tensor) -> Tensor:
    return b.new_zeros(*b.shape[:2], H + REST)


def _config(**options) -> SolverConfig:
    return SolverConfig(**({"scope": "recurrence", "max_evals": 60, "rtol": 1e-11, "atol": 1e-13} | options))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_recurrence_is_solved_as_a_dense_system(solver, backwards):
    chain = Chain(_b(), linear=True, backwards=backwards)
    result = solve(chain, _zeros(chain.b), _config(solver=solver))
    constant = chain(_zeros(chain.b)).flatten(1)
    size = T * (H + REST)
    basis = torch.eye(size, dtype=torch.float64).view(size, T, H + REST)
    columns = []
    for vector in basis:
        columns.append(chain(vector.expand(B, T, H + REST)).flatten(1)[0] - constant[0])
    jacobian = torch.stack(columns, 1)
    dense = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - jacobian, constant.T).T
    assert result.converged.all()
    assert torch.allclose(result.state.flatten(1), dense, atol=1e-9)


@pytest.mark.parametrize(("solver", "gain"), [("anderson", 1.5), ("broyden", 2.0)])
def test_a_position_that_expands_is_solved_by_what_accelerates(solver, gain):
    chain = Chain(_b(), gain=gain)
    result = solve(chain, _zeros(chain.b), _config(solver=solver, memory=6, patience=9))
    assert result.converged.all()
    assert torch.allclose(chain(result.state), result.state, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 20, 60])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_changed_input_leaves_all_before_it_bitwise_unchanged(solver, budget, dtype):
    config = _config(solver=solver, max_evals=budget, rtol=1e-3, atol=0.0)
    b = _b(dtype)
    before = solve(Chain(b, gain=1.6), _zeros(b), config).state
    for t in (0, 3, T - 1):
        changed = b.clone()
        changed[:, t] += 1.0
        after = solve(Chain(changed, gain=1.6), _zeros(b), config).state
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t, H:], before[:, t, H:]) or budget == 1


@pytest.mark.parametrize("gain", [0.6, 1.6, 4.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch_mates(solver, gain):
    config = _config(solver=solver, max_evals=25, rtol=1e-4, atol=0.0)
    b = _b(torch.float32)
    together = solve(Chain(b, gain=gain), _zeros(b), config)
    for row in range(B):
        alone = solve(Chain(b[row : row + 1], gain=gain), _zeros(b[row : row + 1]), config)
        assert torch.equal(alone.state[0], together.state[row])
        assert torch.equal(alone.status[0], together.status[row])
        assert torch.equal(alone.lane_nfe[0], together.lane_nfe[row])


def test_what_is_reported_is_what_was_done():
    chain = Chain(_b())
    result = solve(chain, _zeros(chain.b), _config(rtol=1e-6))
    assert chain.rows == result.total_lane_nfe
    assert result.residual.shape == result.lane_nfe.shape == result.status.shape == (B, T)
    assert int(result.lane_nfe.max()) == result.nfe
    measured = (chain(result.state) - result.state)[..., :H]
    expected = measured.norm(dim=-1) / chain(result.state)[..., :H].norm(dim=-1)
    assert torch.allclose(result.residual, expected, rtol=1e-6)
    assert (result.residual <= 1e-6).all()


def test_an_unconverged_lane_returns_its_best_state():
    chain = Chain(_b(), gain=30.0, linear=True)
    result = solve(chain, _zeros(chain.b), _config(solver="picard", max_evals=12))
    assert (result.status == Status.DIVERGED).any()
    assert torch.isfinite(result.state).all()
    # At the first position nothing came closer than the start.
    assert torch.equal(result.state[:, 0, :H], torch.zeros(B, H, dtype=torch.float64))


def test_a_non_finite_sample_is_reported_and_does_not_spoil_the_others():
    b = _b()
    b[1, 2] = float("nan")
    clean = solve(Chain(_b()), _zeros(b), _config())
    result = solve(Chain(b), _zeros(b), _config())
    assert torch.isfinite(result.state).all()
    assert result.status[1, 2] == Status.NON_FINITE
    assert torch.isinf(result.residual[1, 2])
    for row in (0, 2):
        assert torch.equal(result.state[row], clean.state[row])


def test_damping_shortens_the_first_step():
    chain = Chain(_b())
    calls: list[Tensor] = []
    column = chain.column

    def recording(z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        f = column(z, t)
        return lambda h: calls.append(h.clone()) or f(h)

    chain.column = recording
    solve(chain, _zeros(chain.b), _config(damping=0.25, max_evals=2))
    first = column(_zeros(chain.b), 0)(calls[0])[:, :H]
    assert torch.allclose(calls[1], 0.25 * first)


def test_the_policies():
    chain = Chain(_b(), gain=1.6)
    with pytest.raises(ConvergenceError, match="MAX_ITER"):
        solve(chain, _zeros(chain.b), _config(max_evals=2, policy="raise"))
    with pytest.warns(UserWarning, match="trying damped picard"):
        second = solve(chain, _zeros(chain.b), _config(max_evals=4, policy="fallback"))
    first = solve(chain, _zeros(chain.b), _config(max_evals=4))
    assert second.residual.mean() <= first.residual.mean()


def test_a_map_that_is_no_recurrence_is_refused():
    with pytest.raises(ValueError, match="scope recurrence needs a map with"):
        solve(torch.cos, torch.zeros(2, 3, 4), _config())


def test_half_precision_is_solved_in_float32_from_states_that_keep_their_type():
    b, seen = _b(torch.float32), set()
    chain = Chain(b)
    column = chain.column

    def noted(z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        seen.add(z.dtype)
        return column(z, t)

    chain.column = noted
    result = solve(chain, _zeros(b).bfloat16(), _config(rtol=1e-5, atol=0.0))
    assert seen == {result.state.dtype} == {torch.bfloat16}
    assert result.residual.dtype == torch.float32
    exact = solve(Chain(b), _zeros(b), _config(rtol=1e-5, atol=0.0)).state
    assert torch.allclose(result.state.float(), exact, rtol=0, atol=0.02 * float(exact.abs().max()))


class _Linearised(Chain):
    """`Chain` with its adjoint, by autograd."""

    def adjoint(self, z: Tensor, grad: Tensor) -> Chain:
        outer = self

        class Adjoint:
            own, order = H, range(T - 1, -1, -1)

            def start(self, adjoint: Tensor, t: int) -> Tensor:
                return grad[:, t, :H]

            def column(self, adjoint: Tensor, t: int) -> Callable[[Tensor], Tensor]:
                def f(own: Tensor) -> Tensor:
                    vector = adjoint.clone()
                    vector[:, :t] = 0.0
                    vector[:, t, :H] = own
                    # The others of a position feed on nothing of it: they come from the position after.
                    vector[:, t, H:] = 0.0
                    with torch.enable_grad():
                        leaf = z.clone().requires_grad_()
                        fz = outer(leaf)
                    rest = (
                        torch.autograd.grad(fz, leaf, vector, retain_graph=True)[0][:, t, H:] + grad[:, t, H:]
                    )
                    vector[:, t, H:] = rest
                    out = torch.autograd.grad(fz, leaf, vector)[0][:, t] + grad[:, t]
                    return torch.cat([out[:, :H], rest], 1)

                return f

        return Adjoint()


def test_the_gradient_is_that_of_a_long_unroll():
    grads = []
    for solved in (True, False):
        b = _b().requires_grad_()
        chain = _Linearised(b)
        if solved:
            gradient = GradientConfig(solver=_config())
            state = fixed_point(chain, _zeros(b), _config(), gradient).state
        else:
            state = unroll(chain, _zeros(b), 80)
        state.sin().sum().backward()
        grads.append(b.grad)
    assert torch.allclose(*grads, atol=1e-9)


def test_a_recurrence_whose_adjoint_is_none_is_refused_in_the_backward_pass():
    b = _b().requires_grad_()
    state = fixed_point(Chain(b), _zeros(b), _config(), GradientConfig(solver=_config())).state
    with pytest.raises(ValueError, match="scope recurrence needs a map with"):
        state.sum().backward()
