"""A fast path of `solve` for a few independent lanes on the CPU, as in generation: plain Anderson steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .active import check_contract
from .anderson import Anderson
from .config import SolverConfig
from .lanes import LaneLayout
from .least_squares import NO_PIVOT
from .preconditioner import Preconditioner
from .record import GROWTH_LIMIT, books_on_host
from .result import FixedPoint, Status
from .solve import check_state, solve

Rows = Any  # an array of NumPy, one row or entry for each lane

# So many lanes are few: the time of an iteration beside f is that of starting operations.
FEW = 16
# Evaluations that are left to `solve` where the lanes do not settle by themselves.
_LEFT_OVER = 4
_TYPES = (torch.float32, torch.float64)


@torch.no_grad()
def solve_few(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    config: SolverConfig,
    preconditioner: Preconditioner | None = None,
) -> FixedPoint:
    """`solve` of lanes that do not depend on each other, faster where they are few.

    The iterates are those of `Anderson` up to rounding, which here depends on the other lanes too. All
    arrays are NumPy's: at these sizes torch takes longer to start an operation than to compute it. There are
    no restarts: if a lane does badly, or the budget is nearly used up, `solve` continues from the best
    states with the rest of the budget. `solve` does everything if there are many lanes, if lanes depend on
    each other or are not on the CPU, or if the options ask for another method.

    Args:
        f, z0, config, preconditioner: as for `solve`.
    Returns:
        the `FixedPoint`.
    Raises:
        ConvergenceError, ValueError: as for `solve`.
    """
    check_state(z0)
    if not _fits(z0, config):
        return solve(f, z0, config, preconditioner)
    few = _FewLanes(z0, config, preconditioner)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        while few.evaluations < config.max_evals - _LEFT_OVER:
            if not few.iterate(f):
                break
            if not few.moving.any():
                return few.result()
    left = replace(config, max_evals=config.max_evals - few.evaluations)
    return few.result().followed_by(solve(f, few.tensor(few.best), left, preconditioner))


def _fits(z0: Tensor, config: SolverConfig) -> bool:
    """Whether the lanes are few, and the options leave it open how they are solved."""
    if config.solver != "anderson" or config.damping != 1 or config.scope not in ("position", "sample"):
        return False
    if config.early_precision != "full":
        return False
    if not books_on_host(z0.device) or z0.dtype not in _TYPES or torch.is_autocast_enabled("cpu"):
        return False
    few = 0 < z0.shape[0] <= FEW and z0.numel() > 0 and config.ridge > NO_PIVOT
    return few and not LaneLayout.of(z0, config.scope).coupled


class _FewLanes:
    """The state and the history of N lanes of width D.

    With x = [z, f(z) - z] of every lane, `history` holds the last differences of x: DZ in its first half, DG
    in its second. No array is written to once it is somewhere else too.
    """

    def __init__(self, z0: Tensor, config: SolverConfig, preconditioner: Preconditioner | None) -> None:
        self.config, self.shape, self.layout = config, z0.shape, LaneLayout.of(z0, config.scope)
        self.z: Rows = self.layout.flatten(z0.detach()).numpy()  # (N, D)
        lanes, self.width = self.z.shape
        slots = (config.memory or Anderson.default_memory) - 1
        self.last: Rows | None = None  # x of the evaluation before, (N, 2*D)
        self.history = np.zeros((lanes, slots, 2 * self.width), self.z.dtype)
        self.gram = np.zeros((lanes, slots, slots))  # DG^T DG
        self.ridge, self.least = 1 + config.ridge * np.eye(slots), 1e-200 * np.eye(slots)
        self.evaluations = 0
        self.moving = np.ones(lanes, bool)
        self.lane_evaluations, self.since_best = np.zeros(lanes, np.int32), np.zeros(lanes, np.int32)
        # The best states, |f(z) - z| and |f(z)| there.
        self.best, self.distance, self.size = self.z, np.full(lanes, np.inf), np.ones(lanes)
        self.limit = config.atol * self.width**0.5
        self.factors: tuple[Rows, Rows] | None = None
        if preconditioner is not None:
            known = preconditioner.to(z0)
            self.factors = known.right.numpy(), known.left.T.numpy()

    def tensor(self, rows: Rows) -> Tensor:
        """Rows (N, D) as a state."""
        return torch.from_numpy(rows).view(self.shape)

    def iterate(self, f: Callable[[Tensor], Tensor]) -> bool:
        """Evaluate f, and move the lanes that do not pass; False where one of them is lost."""
        z, width = self.z, self.width
        state = self.tensor(z)
        value = f(state)
        if not self.evaluations:
            check_contract(state, value, None)
        self.evaluations += 1
        fz = value.to(state.dtype).numpy().reshape(z.shape)
        x = np.empty((len(z), 2 * width), z.dtype)
        x[:, :width] = z
        g = np.subtract(fz, z, out=x[:, width:])
        squares = np.einsum("nd,nd->n", g, g), np.einsum("nd,nd->n", fz, fz)
        if not self._judge(*np.sqrt(squares)):
            return False
        if self.moving.any():
            following = self._step(x, g)
            self.z = following if self.moving.all() else np.where(self.moving[:, None], following, z)
            self.last = x
        return True

    def result(self) -> FixedPoint:
        """The outcome, once every lane has converged."""
        shape = self.layout.shape
        residual = (self.distance / np.maximum(self.size, 1e-30)).astype(self.z.dtype)
        return FixedPoint(
            state=self.tensor(self.best),
            residual=torch.from_numpy(residual).view(shape),
            lane_nfe=torch.from_numpy(self.lane_evaluations).view(shape),
            status=torch.full(shape, int(Status.CONVERGED), dtype=torch.uint8),
            nfe=self.evaluations,
            total_lane_nfe=self.evaluations * self.layout.count,
        )

    def _judge(self, distance: Rows, size: Rows) -> bool:
        """Enter |f(z) - z| and |f(z)|, (N,) each; whether no lane is lost."""
        passed = (distance <= self.limit + self.config.rtol * size) & (distance < np.inf)
        better = self.moving & ((distance < self.distance) | passed)
        self.lane_evaluations += self.moving
        self.moving = self.moving & ~passed
        if better.all():  # as in most evaluations
            self.best, self.distance, self.size = self.z, distance, size
            self.since_best *= 0
            return True
        self.best = np.where(better[:, None], self.z, self.best)
        self.distance = np.where(better, distance, self.distance)
        self.size = np.where(better, size, self.size)
        self.since_best = (self.since_best + 1) * ~better
        near = (distance <= GROWTH_LIMIT * self.distance) & (self.since_best < self.config.patience)
        return bool((near | ~self.moving).all())

    def _step(self, x: Rows, g: Rows) -> Rows:
        """The states that follow x = [z, g], (N, D)."""
        if self.last is not None:
            slot = (self.evaluations - 2) % self.history.shape[1]
            self.history[:, slot] = x - self.last
            dg = self.history[:, :, self.width :]
            products = np.einsum("nsd,nd->ns", dg, dg[:, slot])
            self.gram[:, slot] = self.gram[:, :, slot] = products
            gamma = self._least_squares(np.einsum("nsd,nd->ns", dg, g)).astype(x.dtype)
            x = x - np.matmul(gamma[:, None], self.history)[:, 0]  # [z - DZ*gamma, g - DG*gamma]
        z, left = x[:, : self.width], x[:, self.width :]
        if self.factors is None:
            return z + left
        right, left_transposed = self.factors
        positions = left.reshape(-1, len(right))  # (N*D/C, C)
        return z + left + (positions @ right @ left_transposed).reshape(z.shape)

    def _least_squares(self, rhs: Rows) -> Rows:
        """gamma, (N, S), of DG^T DG gamma = rhs, as in `Anderson`."""
        # Where a column of DG is zero, so is its weight.
        normal = self.gram * self.ridge + self.least
        return np.linalg.solve(normal, rhs[..., None])[..., 0]
