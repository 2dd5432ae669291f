"""The solve of lanes that do not depend on each other, such as one new position a row."""

from __future__ import annotations

from collections.abc import Callable

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

_BOOK = np.dtype(
    [
        ("best_distance", "f8"),
        ("best_residual", "f8"),
        ("first_distance", "f8"),
        ("last_distance", "f8"),
        ("peak_distance", "f8"),
        ("tau", "f8"),
        ("since_best", "i4"),
        ("restarts", "i4"),
        ("evaluations", "i4"),
        ("moving", "?"),
        ("given_up", "?"),
        ("fresh", "?"),
    ],
    align=True,
)


@torch.no_grad()
def solve_independent(f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> FixedPoint:
    """Find z with z = f(z), for an f that does not mix lanes.

    It does lane by lane what `solve` does, where no lane need ever be woken. All inner products of an
    iteration come from one matrix product and go to the host in one transfer, where stops, restarts and the
    small least squares are cheap; one more matrix product makes the next state. What this way does not cover
    (a solver other than Anderson, lanes that depend on each other) is left to `solve`.

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
    if config.solver != "anderson" or LaneShape.of(z0, config.scope).coupled:
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
        self.y = self.z.new_zeros(n, 2 * self.slots + 2, width)
        self.last_z = self.best = self.z
        self.limit = config.atol * width**0.5
        self.book = np.zeros(n, dtype=_BOOK)
        for name in ("best_distance", "best_residual", "first_distance", "last_distance"):
            self.book[name] = np.inf
        self.book["tau"] = config.damping
        self.book["moving"] = self.book["fresh"] = True
        self.rows: np.ndarray | None = None  # None: all lanes
        self.final_book = self.book
        self.final_best: Tensor | None = None
        self.current = f  # f at the lanes `rows`
        self.iterations = self.lane_evaluations = 0

    def run(self) -> FixedPoint:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for k in range(self.config.max_evals):
                products = self._products(self._evaluate(), k)
                lost = self._judge(products)
                if not self.book["moving"].any():
                    break
                self._step(products, lost)
                self._narrow()
            return self._result()

    def _evaluate(self) -> Tensor:
        self.iterations += 1
        self.lane_evaluations += self.z.shape[0]
        whole = self.rows is None
        z = self.z.to(self.dtype)
        z = self.lanes.unflatten(z) if whole else z.reshape(-1, self.lanes.width)
        return self.current(z).to(self.z.dtype).reshape(self.z.shape)

    def _products(self, fz: Tensor, k: int) -> np.ndarray:
        """Take f(z) into `y`; the inner products of its rows, (n, K, K)."""
        s, y = self.slots, self.y
        g = fz - self.z
        if k:
            slot = (k - 1) % s
            torch.sub(self.z, self.last_z, out=y[:, slot])
            torch.sub(g, y[:, 2 * s], out=y[:, s + slot])
        y[:, 2 * s] = g
        y[:, 2 * s + 1] = fz
        self.last_z = self.z
        fresh = self.book["fresh"]
        if k and fresh.any():
            y[self._tensor(fresh), : 2 * s] = 0
        fresh[:] = False
        return torch.bmm(y, y.transpose(1, 2)).cpu().numpy().astype(np.float64)

    def _judge(self, products: np.ndarray) -> np.ndarray:
        """Residuals, stops and best states; the lanes that are lost."""
        book, g = self.book, 2 * self.slots
        distance, size = np.sqrt(products[:, g, g]), np.sqrt(products[:, g + 1, g + 1])
        finite = np.isfinite(distance)
        distance = np.where(finite, distance, np.inf)
        passed = finite & (distance <= self.limit + self.config.rtol * size)
        moving = book["moving"].copy()
        better = moving & ((distance < book["best_distance"]) | passed)
        if better.sum() == moving.sum():
            self.best = self.z  # lanes at rest are at their best states
        else:
            self.best = torch.where(self._tensor(better).unsqueeze(1), self.z, self.best)
        residual = np.where(finite, distance / np.maximum(size, 1e-30), np.inf)
        book["best_distance"] = np.where(better, distance, book["best_distance"])
        book["best_residual"] = np.where(better, residual, book["best_residual"])
        first = book["first_distance"]
        book["first_distance"] = np.where(np.isinf(first), distance, first)
        book["last_distance"] = np.where(moving, distance, book["last_distance"])
        book["peak_distance"] = np.maximum(book["peak_distance"], book["last_distance"])
        book["evaluations"] += moving
        book["since_best"] = np.where(moving, np.where(better, 0, book["since_best"] + 1), book["since_best"])
        moving &= ~passed
        book["moving"] = moving
        grown = distance > GROWTH_LIMIT * book["best_distance"]
        return moving & (~finite | grown | (book["since_best"] >= self.config.patience))

    def _step(self, products: np.ndarray, lost: np.ndarray) -> None:
        """The next states: Anderson's step where a lane moves, its best state where it is lost."""
        s, book = self.slots, self.book
        going = book["moving"] & ~lost
        past = products[:, s : 2 * s]
        gamma = self._least_squares(past[..., 2 * s : 2 * s + 1], past[..., s : 2 * s])
        gamma[~going | ~np.isfinite(gamma).all(1)] = 0
        weights = np.zeros((len(book), 1, 2 * s + 2))
        weights[:, 0, :s] = -gamma
        weights[:, 0, s : 2 * s] = -gamma * book["tau"][:, None]
        weights[:, 0, 2 * s] = np.where(going, book["tau"], 0)
        if not np.isfinite(products).all():
            # 0 * NaN is NaN: what is not finite must go.
            self.y[self._tensor(~going)] = 0
        weight = torch.from_numpy(weights).to(self.z)
        self.z = torch.baddbmm(self.z.unsqueeze(1), weight, self.y).squeeze(1)
        if lost.any():
            self.z = torch.where(self._tensor(lost).unsqueeze(1), self.best, self.z)
            book["restarts"] += lost
            book["tau"][lost] *= 0.5
            book["fresh"] |= lost
            book["since_best"][lost] = 0
            hopeless = lost & (book["restarts"] > MAX_RESTARTS)
            book["given_up"] |= hopeless
            book["moving"] &= ~hopeless

    def _least_squares(self, rhs: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """gamma, (n, slots), from DG^T g (n, slots, 1) and DG^T DG, columns scaled to length 1."""
        scale = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
        inverse = np.where(scale > 0, 1 / scale, 0)[..., None]
        normal = gram * inverse * inverse.transpose(0, 2, 1)
        diagonal = np.arange(self.slots)
        normal[:, diagonal, diagonal] = 1 + self.config.ridge
        try:
            return (np.linalg.solve(normal, rhs * inverse) * inverse)[..., 0]
        except np.linalg.LinAlgError:
            finite = np.nan_to_num(normal, posinf=0, neginf=0)
            return (np.linalg.pinv(finite, hermitian=True) @ (rhs * inverse) * inverse)[..., 0]

    def _tensor(self, mask: np.ndarray) -> Tensor:
        return torch.from_numpy(mask).to(self.z.device)

    # ------------------------------------------------------------------ the lanes evaluated

    def _narrow(self) -> None:
        """Go on with the moving lanes only, where that leaves out enough."""
        moving = self.book["moving"]
        least = {"never": 2.0, "auto": _NARROW, "always": 0.0}[self.config.active_set] * len(moving)
        rest = len(moving) - moving.sum()
        if rest == 0 or rest == len(moving) or rest < least or not isinstance(self.f, Restrictable):
            return
        final = self._put_away()
        kept = np.flatnonzero(moving)
        index = torch.from_numpy(kept).to(self.z.device)
        self.rows = kept if self.rows is None else self.rows[kept]
        self.z, self.last_z, self.best = (x.index_select(0, index) for x in (self.z, self.last_z, self.best))
        self.y = self.y.index_select(0, index)
        self.book = self.book[kept]
        lanes = torch.from_numpy(self.rows).to(self.z.device)
        state = self.lanes.unflatten(final).to(self.dtype)  # f does not look at other lanes
        self.current = self.f.restrict(state, self.lanes.positions(lanes), None)

    def _put_away(self) -> Tensor:
        """Copy what is known of the lanes `rows` to the final book and states; the states."""
        if self.final_best is None:
            self.final_book, self.final_best = self.book.copy(), self.best.clone()
        else:
            assert self.rows is not None
            self.final_book[self.rows] = self.book
            self.final_best[torch.from_numpy(self.rows).to(self.z.device)] = self.best
        return self.final_best

    def _result(self) -> FixedPoint:
        best = self._put_away()
        book, shape = self.final_book, self.lanes.shape
        status = np.full(len(book), int(Status.MAX_ITER), dtype=np.uint8)
        stuck = book["given_up"] | (book["since_best"] > self.config.patience // 2)
        status[stuck] = Status.STALLED
        first, peak = book["first_distance"], book["peak_distance"]
        grown = (peak > DIVERGED * first) & (book["best_distance"] >= first)
        status[(stuck & grown) | (book["last_distance"] > DIVERGED * first)] = Status.DIVERGED
        status[(stuck & np.isinf(peak)) | np.isinf(book["last_distance"])] = Status.NON_FINITE
        status[~book["moving"] & ~book["given_up"]] = Status.CONVERGED

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.copy()).to(self.z.device).view(shape)

        return FixedPoint(
            state=self.lanes.unflatten(best).to(self.dtype),
            residual=tensor(book["best_residual"]).to(self.z.dtype),
            evaluations=tensor(book["evaluations"]),
            status=tensor(status),
            iterations=self.iterations,
            lane_evaluations=self.lane_evaluations,
        )
