"""The solve of lanes that do not depend on each other, such as one new position a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .anderson import Anderson
from .config import SolverConfig
from .lanes import LaneShape, Restrictable
from .ledger import DIVERGED, GROWTH_LIMIT, MAX_RESTARTS
from .result import FixedPoint, Status
from .solve import apply_policy, solve

# The lanes evaluated are narrowed to those still moving when that leaves out at least this share of them.
_NARROW = 0.25


@dataclass
class _Book:
    """One entry a lane, (n,) each, on the host; distances and sizes as in `Ledger`."""

    best_distance: np.ndarray
    best_size: np.ndarray
    first_distance: np.ndarray
    last_distance: np.ndarray
    peak_distance: np.ndarray
    tau: np.ndarray
    since_best: np.ndarray
    restarts: np.ndarray
    evaluations: np.ndarray
    moving: np.ndarray
    given_up: np.ndarray
    fresh: np.ndarray

    @classmethod
    def start(cls, lanes: int, tau: float) -> _Book:
        """The entries of lanes that have not been evaluated yet."""
        return cls(
            best_distance=np.full(lanes, np.inf),
            best_size=np.ones(lanes),
            first_distance=np.full(lanes, np.inf),
            last_distance=np.full(lanes, np.inf),
            peak_distance=np.zeros(lanes),
            tau=np.full(lanes, tau),
            since_best=np.zeros(lanes, np.int32),
            restarts=np.zeros(lanes, np.int32),
            evaluations=np.zeros(lanes, np.int32),
            moving=np.ones(lanes, bool),
            given_up=np.zeros(lanes, bool),
            fresh=np.zeros(lanes, bool),  # at the start there is no history to be forgotten
        )

    def rows(self, index: np.ndarray) -> _Book:
        """Copies of the entries `index`."""
        return _Book(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: np.ndarray, rows: _Book) -> None:
        """Overwrite the entries `index`."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(rows, f.name)

    def status(self, patience: int) -> np.ndarray:
        """The `Status` of every lane, as in `Ledger`."""
        status = np.full(len(self.moving), int(Status.MAX_ITER), dtype=np.uint8)
        stuck = self.given_up | (self.since_best > patience // 2)
        limit = DIVERGED * self.first_distance
        status[stuck] = Status.STALLED
        grown = (self.peak_distance > limit) & (self.best_distance >= self.first_distance)
        status[(stuck & grown) | (self.last_distance > limit)] = Status.DIVERGED
        status[(stuck & np.isinf(self.peak_distance)) | np.isinf(self.last_distance)] = Status.NON_FINITE
        status[~self.moving & ~self.given_up] = Status.CONVERGED
        return status


@torch.no_grad()
def solve_independent(f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> FixedPoint:
    """Find z with z = f(z), for an f that does not mix lanes.

    It does lane by lane what `solve` does, where no lane need ever be woken. All inner products of an
    iteration come from one matrix product and go to the host in one transfer, where stops, restarts and the
    small least squares are cheap; one more matrix product makes the next state. What this way does not cover
    (a solver other than Anderson, lanes that depend on each other, a recurrence) is left to `solve`.

    Args:
        f: map of a tensor to one of the same shape; where it has `restrict`, converged lanes are
            not evaluated.
        z0: starting state, (..., C); dimension 0 indexes independent samples.
        config: solver, budget, tolerance, scope, policy.
    Returns:
        the `FixedPoint`, as from `solve`.
    Raises:
        ConvergenceError: policy `raise`, and some lane did not converge.
    """
    if config.solver != "anderson" or config.scope == "recurrence" or LaneShape.of(z0, config.scope).coupled:
        return solve(f, z0, config)
    return apply_policy(_Run(f, z0, config).run(), f, config)


class _Run:
    """State of one solve. Tensors and the book cover the lanes `rows`; `final_*` cover all of them.

    `y` holds, lane by lane, the rows DZ, DG, g and f(z) of Anderson's method (see `Anderson`).
    """

    def __init__(self, f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> None:
        self.f, self.config, self.dtype = f, config, z0.dtype
        self.lanes = LaneShape.of(z0, config.scope)
        z = self.lanes.flatten(z0.detach())
        self.z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z  # (n, D), never written to
        n, width = self.z.shape
        self.slots = (config.memory or Anderson.default_memory) - 1
        self.last_z = self.best = self.z
        self.limit = config.atol * width**0.5
        self.book = _Book.start(n, config.damping)
        self.some_fresh = False
        self.rows: np.ndarray | None = None  # None: all lanes
        self.final_book: _Book | None = None
        self.final_best: Tensor | None = None
        self.current = f  # f at the lanes `rows`
        self.iterations = self.lane_evaluations = 0
        self._hold(self.z.new_zeros(n, 2 * self.slots + 2, width))

    def run(self) -> FixedPoint:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for k in range(self.config.max_evals):
                products = self._products(self._evaluate(), k)
                lost = self._judge(products, k)
                moving = int(np.count_nonzero(self.book.moving))
                if not moving:
                    break
                self._step(products, lost)
                self._narrow(moving)
            return self._result()

    def _hold(self, y: Tensor) -> None:
        s = self.slots
        self.y, self.y_transposed = y, y.transpose(1, 2)
        self.dz, self.dg = [y[:, i] for i in range(s)], [y[:, s + i] for i in range(s)]
        self.g, self.fz = y[:, 2 * s], y[:, 2 * s + 1]

    def _evaluate(self) -> Tensor:
        self.iterations += 1
        self.lane_evaluations += self.z.shape[0]
        z = self.z.to(self.dtype)
        z = self.lanes.unflatten(z) if self.rows is None else z.reshape(-1, self.lanes.width)
        return self.current(z).to(self.z.dtype).reshape(self.z.shape)

    def _products(self, fz: Tensor, k: int) -> np.ndarray:
        """Take f(z) into `y`; the inner products of its rows, (n, K, K)."""
        g = fz - self.z
        if k:
            slot = (k - 1) % self.slots
            torch.sub(self.z, self.last_z, out=self.dz[slot])
            torch.sub(g, self.g, out=self.dg[slot])
        self.g.copy_(g)
        self.fz.copy_(fz)
        self.last_z = self.z
        if self.some_fresh:
            self.y[self._tensor(self.book.fresh), : 2 * self.slots] = 0
            self.book.fresh[:] = self.some_fresh = False
        return torch.bmm(self.y, self.y_transposed).cpu().numpy().astype(np.float64)

    def _judge(self, products: np.ndarray, k: int) -> np.ndarray | None:
        """Residuals, stops and best states; the lanes that are lost, None where there is none."""
        book, g = self.book, 2 * self.slots
        distance, size = np.sqrt(products[:, g, g]), np.sqrt(products[:, g + 1, g + 1])
        passed = distance <= self.limit + self.config.rtol * size
        self.finite = bool(np.isfinite(distance.sum()))
        if not self.finite:
            sound = np.isfinite(distance)
            passed &= sound
            distance = np.where(sound, distance, np.inf)
        moving = book.moving
        better = ((distance < book.best_distance) | passed) & moving
        count = np.count_nonzero(moving)
        book.evaluations += moving
        if k == 0:
            book.first_distance = distance
        book.moving = moving & ~passed
        if np.count_nonzero(better) == count:  # and the lanes at rest are at their best states
            self.best = self.z
            if count == len(better):
                book.best_distance = book.last_distance = distance
                book.best_size = size
                book.peak_distance = np.maximum(book.peak_distance, distance)
            else:
                self._note(better, better, distance, size)
            book.since_best[better] = 0
            return None
        self.best = torch.where(self._tensor(better).unsqueeze(1), self.z, self.best)
        self._note(better, moving, distance, size)
        book.since_best[moving & ~better] += 1
        book.since_best[better] = 0
        grown = (distance > GROWTH_LIMIT * book.best_distance) | np.isinf(distance)
        lost = book.moving & (grown | (book.since_best >= self.config.patience))
        return lost if np.count_nonzero(lost) else None

    def _note(self, better: np.ndarray, moving: np.ndarray, distance: np.ndarray, size: np.ndarray) -> None:
        book = self.book
        book.best_distance = np.where(better, distance, book.best_distance)
        book.best_size = np.where(better, size, book.best_size)
        book.last_distance = np.where(moving, distance, book.last_distance)
        book.peak_distance = np.maximum(book.peak_distance, book.last_distance)

    def _step(self, products: np.ndarray, lost: np.ndarray | None) -> None:
        """The next states: Anderson's step where a lane moves, its best state where it is lost."""
        s, book = self.slots, self.book
        going = book.moving if lost is None else book.moving & ~lost
        past = products[:, s : 2 * s]
        gamma = self._least_squares(past[..., 2 * s : 2 * s + 1], past[..., s : 2 * s])
        if not self.finite:
            # 0 * NaN is NaN: what is not finite must go.
            gamma[~np.isfinite(gamma).all(1)] = 0
            self.y[self._tensor(~going)] = 0
        tau = book.tau * going
        weights = np.zeros((len(going), 1, 2 * s + 2))
        weights[:, 0, :s] = -gamma * going[:, None]
        weights[:, 0, s : 2 * s] = -gamma * tau[:, None]
        weights[:, 0, 2 * s] = tau
        self.z = torch.baddbmm(self.z.unsqueeze(1), torch.from_numpy(weights).to(self.z), self.y).squeeze(1)
        if lost is not None:
            self._restart(lost)

    def _restart(self, lost: np.ndarray) -> None:
        """Send lanes back to their best states with half the step and no history; in the end give up."""
        book = self.book
        self.z = torch.where(self._tensor(lost).unsqueeze(1), self.best, self.z)
        book.restarts += lost
        book.tau = np.where(lost, 0.5 * book.tau, book.tau)
        book.fresh |= lost
        self.some_fresh = True
        book.since_best[lost] = 0
        hopeless = lost & (book.restarts > MAX_RESTARTS)
        book.given_up |= hopeless
        book.moving &= ~hopeless

    def _least_squares(self, rhs: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """gamma, (n, slots), from DG^T g (n, slots, 1) and DG^T DG, columns scaled to length 1."""
        scale = np.sqrt(np.einsum("nii->ni", gram))
        inverse = (1 / np.where(scale > 0, scale, np.inf))[..., None]
        normal = gram * inverse * inverse.transpose(0, 2, 1)
        np.einsum("nii->ni", normal)[:] = 1 + self.config.ridge
        try:
            gamma = np.linalg.solve(normal, rhs * inverse)
        except np.linalg.LinAlgError:
            normal = np.nan_to_num(normal, posinf=0, neginf=0)
            gamma = np.linalg.pinv(normal, hermitian=True) @ (rhs * inverse)
        return (gamma * inverse)[..., 0]

    def _tensor(self, mask: np.ndarray) -> Tensor:
        return torch.from_numpy(mask).to(self.z.device)

    # ------------------------------------------------------------------ the lanes evaluated

    def _narrow(self, moving: int) -> None:
        """Go on with the `moving` lanes only, where that leaves out enough."""
        lanes = len(self.book.moving)
        least = {"never": 2.0, "auto": _NARROW, "always": 0.0}[self.config.active_set] * lanes
        if moving == lanes or lanes - moving < least or not isinstance(self.f, Restrictable):
            return
        final = self._put_away()
        kept = np.flatnonzero(self.book.moving)
        index = torch.from_numpy(kept).to(self.z.device)
        self.rows = kept if self.rows is None else self.rows[kept]
        self.z, self.last_z, self.best = (x.index_select(0, index) for x in (self.z, self.last_z, self.best))
        self._hold(self.y.index_select(0, index))
        self.book = self.book.rows(kept)
        rows = torch.from_numpy(self.rows).to(self.z.device)
        state = self.lanes.unflatten(final).to(self.dtype)  # f does not look at other lanes
        self.current = self.f.restrict(state, self.lanes.positions(rows), None)

    def _put_away(self) -> Tensor:
        """Copy what is known of the lanes `rows` to the final book and states; the states."""
        if self.rows is None:
            self.final_book, self.final_best = self.book, self.best
            return self.best
        assert self.final_book is not None
        assert self.final_best is not None
        self.final_book.put(self.rows, self.book)
        index = torch.from_numpy(self.rows).to(self.z.device)
        self.final_best = self.final_best.index_copy(0, index, self.best)
        return self.final_best

    def _result(self) -> FixedPoint:
        best = self._put_away()
        book, shape = self.final_book, self.lanes.shape
        assert book is not None

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(self.z.device).view(shape)

        return FixedPoint(
            state=self.lanes.unflatten(best).to(self.dtype),
            residual=tensor(book.best_distance / np.maximum(book.best_size, 1e-30)).to(self.z.dtype),
            evaluations=tensor(book.evaluations),
            status=tensor(book.status(self.config.patience)),
            iterations=self.iterations,
            lane_evaluations=self.lane_evaluations,
        )
