"""The loop around every solver: evaluation, residuals, freezing, waking, safeguards, the best state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .config import SolverConfig
from .lanes import LaneShape
from .registry import get_solver
from .result import ConvergenceError, ConvergenceWarning, FixedPoint, Status

# A lane whose residual exceeds its best by this factor goes back to its best state.
_GROWTH_LIMIT = 1e3
# Restarts (each with half the step) before a lane is given up as stalled, diverged or non-finite.
_MAX_RESTARTS = 4
# The active set shrinks when that drops at least this share of the lanes now evaluated.
_SHRINK = 0.2
# Gathered rows come in multiples of this, so that a matrix product rounds a row the same in any company.
ROW_MULTIPLE = 16


@runtime_checkable
class Restrictable(Protocol):
    """A map that can be evaluated at some positions only."""

    def __call__(self, z: Tensor) -> Tensor:
        """f(z) for z of shape (..., C)."""

    def restrict(self, z: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """f at the flat `positions` (n,) with all other positions held at z: (n, C) -> (n, C)."""


@torch.no_grad()
def solve(f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> FixedPoint:
    """Find z with z = f(z), lane by lane.

    Args:
        f: map of a tensor to one of the same shape; where it has `restrict` (see `Restrictable`), frozen
            lanes are not evaluated.
        z0: starting state, (..., C); dimension 0 indexes independent samples.
        config: solver, budget, tolerance, scope, policy.
    Returns:
        the `FixedPoint`; its state is detached and finite wherever z0 is.
    Raises:
        ConvergenceError: policy `raise`, and some lane did not converge.
    """
    result = _Loop(f, z0, config).run()
    if config.policy == "best" or bool(result.converged.all()):
        return result
    if config.policy == "raise":
        raise ConvergenceError(result.explain())
    return _fall_back(f, result, config)


def _fall_back(f: Callable[[Tensor], Tensor], first: FixedPoint, config: SolverConfig) -> FixedPoint:
    """Damped Picard from the best state, on the lanes of the samples that failed; keeps what is better."""
    warnings.warn(
        f"{config.solver} did not converge, trying damped picard. {first.explain()}",
        ConvergenceWarning,
        stacklevel=3,
    )
    damped = replace(config, solver="picard", memory=0, damping=min(config.damping, 0.5), policy="best")
    second = solve(f, first.state, damped)
    better = second.residual < first.residual
    lanes = LaneShape.of(first.state, config.scope)
    rows = torch.where(better.view(-1, 1), lanes.flatten(second.state), lanes.flatten(first.state))
    return FixedPoint(
        state=lanes.unflatten(rows),
        residual=torch.where(better, second.residual, first.residual),
        evaluations=first.evaluations + second.evaluations,
        status=torch.where(better, second.status, first.status),
        iterations=first.iterations + second.iterations,
        lane_evaluations=first.lane_evaluations + second.lane_evaluations,
    )


@dataclass(frozen=True)
class _Measured:
    """|f(z) - z|, that relative to |f(z)|, and whether it is good enough; (n,) each, inf: not finite."""

    distance: Tensor
    residual: Tensor
    passed: Tensor

    def rows(self, index: Tensor) -> _Measured:
        return _Measured(self.distance[index], self.residual[index], self.passed[index])


class _Loop:
    """State of one solve: `rows` are the lanes evaluated between rechecks, other tensors cover all lanes."""

    def __init__(self, f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> None:
        self.f, self.config = f, config
        self.lanes = LaneShape.of(z0, config.scope)
        z = self.lanes.flatten(z0.detach())
        self.z = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).clone()  # (N, D)
        self.dtype = z0.dtype
        n, device = self.lanes.count, z.device

        def lane_tensor(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n,), value, dtype=dtype, device=device)

        self.best = self.z.clone()
        self.best_residual = lane_tensor(float("inf"), self.z.dtype)
        # Which state is best, and which is lost, goes by |f(z) - z|: relative to |f(z)| a state that
        # explodes looks no worse than the start.
        self.best_distance = lane_tensor(float("inf"), self.z.dtype)
        self.first_distance = lane_tensor(float("inf"), self.z.dtype)
        self.last_distance = lane_tensor(float("inf"), self.z.dtype)
        self.peak_distance = lane_tensor(0.0, self.z.dtype)
        self.moving = lane_tensor(True, torch.bool)
        self.live = lane_tensor(True, torch.bool)  # lanes of samples that have not ended
        self.given_up = lane_tensor(False, torch.bool)
        self.fresh = lane_tensor(True, torch.bool)
        self.tau = lane_tensor(config.damping, self.z.dtype)
        self.since_best = lane_tensor(0, torch.int32)
        self.restarts = lane_tensor(0, torch.int32)
        self.evaluations = lane_tensor(0, torch.int32)
        self.rows = torch.arange(n, device=device)
        self.moving_count = n
        self.some_fresh = True
        self.stepper = get_solver(config.solver)(config, self.z)
        self.can_restrict = config.active_set and isinstance(f, Restrictable)
        self.restricted: Callable[[Tensor], Tensor] | None = None
        self.iterations = 0
        self.lane_evaluations = 0

    # ------------------------------------------------------------------ the loop

    def run(self) -> FixedPoint:
        budget, every = self.config.max_evals, self.config.recheck_every
        for k in range(budget):
            if self.lanes.coupled and (k % every == 0 or k == budget - 1):
                self._recheck()
                if self.moving_count == 0 and not bool(self.live.any()):
                    break
            elif self.moving_count == 0:
                if not self.lanes.coupled:
                    break
                self._idle()
            else:
                fz = self._evaluate_rows()
                self._advance(fz, self._measure(self._at(self.rows), fz))
            self._shrink()
        return self._result()

    def _idle(self) -> None:
        """An iteration in which nothing moves, without an evaluation of f.

        It takes its place in the solver's history, so that a lane woken later finds its own where it would be
        had any other lane been moving.
        """
        z = self._at(self.rows)
        self.stepper.step(z, z, None, self.tau[self.rows].unsqueeze(1))

    def _recheck(self) -> None:
        """Evaluate every lane of the samples still going; wake lanes, end samples, step the moving lanes."""
        lanes = (self.live if self.can_restrict else torch.ones_like(self.live)).nonzero().squeeze(1)
        fz = self._evaluate(lanes)
        measured = self._measure(self._at(lanes), fz)
        self._settle(lanes, measured)
        passed = measured.passed
        self._end_samples(lanes[~(passed | self.given_up[lanes])])
        if self.can_restrict:
            keep = torch.zeros_like(self.live)
            keep[self.rows] = True
            self._hold(((keep | self.moving) & self.live).nonzero().squeeze(1))
        if self.rows.numel() == lanes.numel():
            self._advance(fz, measured)
        elif self.rows.numel():
            position = self._positions_in(lanes)[self.rows]
            self._advance(fz.index_select(0, position), measured.rows(position))
        else:
            self.moving_count = 0

    def _settle(self, lanes: Tensor, measured: _Measured) -> None:
        """Freeze the lanes that pass, wake the frozen ones that do not, renew best residuals that are stale.

        The lanes before a lane have moved since its best residual was measured; unless the lane has since
        lost its way, its state now is the better one. That it is no progress still counts against its
        patience. A woken lane starts again: what it rested at solved another equation.
        """
        moving, passed, distance = self.moving[lanes], measured.passed, measured.distance
        self.given_up[lanes] &= ~passed
        self.evaluations[lanes] += (moving & passed).to(torch.int32)
        woken = ~moving & ~passed & ~self.given_up[lanes] & self.live[lanes]
        best = self.best_distance[lanes]
        stale = moving & ~passed & (distance >= best) & (distance <= 10 * best)
        self.moving[lanes] = (moving & ~passed) | woken
        self.fresh[lanes] |= woken
        self.some_fresh = True
        here = passed | stale | woken
        self.best[lanes] = torch.where(here.unsqueeze(1), self._at(lanes), self.best[lanes])
        self.best_residual[lanes] = torch.where(here, measured.residual, self.best_residual[lanes])
        self.best_distance[lanes] = torch.where(here, distance, best).masked_fill(woken, float("inf"))
        self.first_distance[lanes] = self.first_distance[lanes].masked_fill(woken, float("inf"))
        self.peak_distance[lanes] = self.peak_distance[lanes].masked_fill(woken, 0.0)
        self.last_distance[lanes] = distance

    def _end_samples(self, unsettled: Tensor) -> None:
        """A sample ends at a recheck that all its lanes pass: from there on nothing would change."""
        going = torch.zeros(self.lanes.samples, dtype=torch.bool, device=unsettled.device)
        going[self.lanes.sample_of(unsettled)] = True
        self.live &= going.repeat_interleave(self.lanes.count // self.lanes.samples)
        self.moving &= self.live

    def _advance(self, fz: Tensor, measured: _Measured) -> None:
        """Freezing, best states and the next states of the lanes `rows`, given f and its residual there."""
        rows, distance = self.rows, measured.distance
        z, moving, finite = self._at(rows), self.moving[rows], torch.isfinite(distance)
        best_distance, first_distance = self.best_distance[rows], self.first_distance[rows]
        better = moving & ((distance < best_distance) | measured.passed)
        self.best[rows] = torch.where(better.unsqueeze(1), z, self.best[rows])
        self.best_distance[rows] = torch.where(better, distance, best_distance)
        self.best_residual[rows] = torch.where(better, measured.residual, self.best_residual[rows])
        self.first_distance[rows] = torch.where(torch.isinf(first_distance), distance, first_distance)
        self.last_distance[rows] = torch.where(moving, distance, self.last_distance[rows])
        self.peak_distance[rows] = torch.maximum(self.peak_distance[rows], self.last_distance[rows])
        self.evaluations[rows] += moving.to(torch.int32)
        since = self.since_best[rows]
        since = torch.where(moving, torch.where(better, 0, since + 1), since)
        self.since_best[rows] = since
        moving = moving & ~measured.passed
        grown = distance > _GROWTH_LIMIT * best_distance
        lost = moving & (~finite | grown | (since >= self.config.patience))

        usable = torch.where(finite.unsqueeze(1), fz, z)
        fresh = self.fresh[rows].unsqueeze(1) if self.some_fresh else None
        following = self.stepper.step(z, usable, fresh, self.tau[rows].unsqueeze(1))
        following = torch.where(torch.isfinite(following).all(1, keepdim=True), following, usable)
        following = torch.where(moving.unsqueeze(1), following, z)
        self.moving[rows] = moving
        self.fresh[rows] = False
        self.z = following if rows.numel() == self.lanes.count else self.z.index_copy(0, rows, following)
        self.moving_count, lost_count = torch.stack([moving.sum(), lost.sum()]).tolist()
        self.some_fresh = lost_count > 0
        if lost_count:
            self._restart(rows[lost])

    def _restart(self, lost: Tensor) -> None:
        """Send lanes back to their best state with half the step and no history; in the end give up."""
        self.restarts[lost] += 1
        self.tau[lost] *= 0.5
        self.fresh[lost] = True
        self.since_best[lost] = 0
        self.z[lost] = self.best[lost]
        hopeless = self.restarts[lost] > _MAX_RESTARTS
        self.given_up[lost] = hopeless
        self.moving[lost] = ~hopeless
        self.moving_count -= int(hopeless.sum())

    def _measure(self, z: Tensor, fz: Tensor) -> _Measured:
        """Residuals of the rows, and whether they are within the tolerance (never where not finite)."""
        size = torch.linalg.vector_norm(fz, dim=1)
        distance = torch.linalg.vector_norm(fz - z, dim=1)
        limit = self.config.atol * fz.shape[1] ** 0.5 + self.config.rtol * size
        finite = torch.isfinite(distance)
        distance = torch.where(finite, distance, float("inf"))
        residual = torch.where(finite, distance / size.clamp(min=1e-30), float("inf"))
        return _Measured(distance, residual, finite & (distance <= limit))

    # ------------------------------------------------------------------ evaluation and the active set

    def _at(self, lanes: Tensor) -> Tensor:
        return self.z if lanes.numel() == self.lanes.count else self.z.index_select(0, lanes)

    def _positions_in(self, lanes: Tensor) -> Tensor:
        """For every lane its place in `lanes`, or -1."""
        place = torch.full((self.lanes.count,), -1, dtype=torch.long, device=lanes.device)
        place[lanes] = torch.arange(lanes.numel(), device=lanes.device)
        return place

    def _evaluate(self, lanes: Tensor) -> Tensor:
        """f at the flat `lanes`, all others held."""
        if self.can_restrict and lanes.numel() < self.lanes.count:
            return self._call(self._restrict(lanes), lanes)
        fz = self._call(self.f, torch.arange(self.lanes.count, device=lanes.device))
        return fz if lanes.numel() == self.lanes.count else fz.index_select(0, lanes)

    def _evaluate_rows(self) -> Tensor:
        if self.restricted is None:
            return self._evaluate(self.rows)
        return self._call(self.restricted, self.rows)

    def _restrict(self, lanes: Tensor) -> Callable[[Tensor], Tensor]:
        z = self.lanes.unflatten(self.z).to(self.dtype)
        return self.f.restrict(z, self.lanes.positions(lanes))  # type: ignore[attr-defined]

    def _call(self, f: Callable[[Tensor], Tensor], lanes: Tensor) -> Tensor:
        self.iterations += 1
        self.lane_evaluations += lanes.numel()
        z = self._at(lanes).to(self.dtype)
        whole = lanes.numel() == self.lanes.count
        fz = f(self.lanes.unflatten(z) if whole else z.reshape(-1, self.lanes.width))
        return fz.to(self.z.dtype).reshape(lanes.numel(), -1)

    def _shrink(self) -> None:
        """Stop evaluating frozen lanes once enough of them have frozen."""
        if not self.can_restrict or self.moving_count == 0:
            return
        target = min(-(-self.moving_count // ROW_MULTIPLE) * ROW_MULTIPLE, self.lanes.count)
        if self.rows.numel() - target < _SHRINK * self.rows.numel():
            return
        # Frozen lanes fill up the last multiple; they are evaluated and ignored.
        order = torch.argsort(self.moving[self.rows].to(torch.int8), descending=True, stable=True)
        self._hold(self.rows[order[:target].sort().values])

    def _hold(self, rows: Tensor) -> None:
        """Make `rows` the lanes that are evaluated between rechecks and whose history is kept."""
        if rows.numel() == self.rows.numel() and torch.equal(rows, self.rows):
            return
        self.stepper.select(self._positions_in(self.rows)[rows])
        self.rows = rows
        self.restricted = self._restrict(rows) if 0 < rows.numel() < self.lanes.count else None

    # ------------------------------------------------------------------ the result

    def _result(self) -> FixedPoint:
        status = torch.full_like(self.evaluations, Status.MAX_ITER, dtype=torch.uint8)
        stuck = self.given_up | (self.since_best > self.config.patience // 2)
        status[stuck] = Status.STALLED
        # A lane that ends at its best state may have got there by restarts only: see how far it went.
        grown = (self.peak_distance > 1e2 * self.first_distance) & (self.best_distance >= self.first_distance)
        status[(stuck & grown) | (self.last_distance > 1e2 * self.first_distance)] = Status.DIVERGED
        exploded = stuck & torch.isinf(self.peak_distance)
        status[exploded | torch.isinf(self.last_distance)] = Status.NON_FINITE
        status[~self.moving & ~self.given_up] = Status.CONVERGED
        return FixedPoint(
            state=self.lanes.unflatten(self.best).to(self.dtype),
            residual=self.best_residual.view(self.lanes.shape),
            evaluations=self.evaluations.view(self.lanes.shape),
            status=status.view(self.lanes.shape),
            iterations=self.iterations,
            lane_evaluations=self.lane_evaluations,
        )
