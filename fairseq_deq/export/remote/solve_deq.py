"""Fixed points z = f(z) of independent or causally coupled positions, by Anderson acceleration.

Part of a model that fairseq_deq exported (MIT licence). It takes the same steps as the package's own solver,
and finds the same states. Only the choice of the frozen positions that f is evaluated at besides the moving
ones is simpler here.

A position is *moving*, *frozen* (within the tolerance when it was last evaluated) or *final*
(frozen for good). A *recheck* evaluates frozen positions again, and wakes those that do not pass any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .anderson_deq import History
from .options_deq import SolveOptions
from .rows_deq import Preconditioner

# A position whose residual exceeds its best by this factor goes back to its best state.
GROWTH_LIMIT = 1e3
# Evaluations without a new best residual after which a position goes back, and how often it may before it is
# abandoned.
PATIENCE, MAX_RESTARTS = 6, 6
# An abandoned position tries again when its residual at a recheck has changed by more than this share: then
# the positions that it depends on have moved.
MOVED = 0.01
# The iteration of the first recheck, and the distance to the next one: at least so many iterations, or this
# share of the iterations so far.
FIRST_RECHECK, RECHECK_GAP, RECHECK_SHARE = 12, 3, 0.1
# Between rechecks a position that depends on others freezes at this share of the tolerance.
MARGIN = 0.8
# f is narrowed to the rows and times where positions move if that leaves at most this share of them.
NARROW = 0.75


@dataclass(frozen=True)
class Solved:
    """The outcome of a solve.

    Attributes:
        state: the best state found, (B, T, C).
        residual: |f(z) - z| / |f(z)| at that state, (B, T); inf where f was never finite.
        evaluations: number of evaluations of f while the position was moving, (B, T).
        converged: (B, T) bool.
    """

    state: Tensor
    residual: Tensor
    evaluations: Tensor
    converged: Tensor


def rechecks(budget: int) -> set[int]:
    """The iterations that are rechecks.

    They depend on the budget alone, so that no position depends on later ones.

    Args:
        budget: largest number of evaluations.
    """
    iterations, k = set(), FIRST_RECHECK
    while k < budget - 1:
        iterations.add(k)
        k += max(RECHECK_GAP, round(k * RECHECK_SHARE))
    return iterations | {budget - 1}


@torch.no_grad()
def solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    real: Tensor,
    options: SolveOptions,
    preconditioner: Preconditioner | None = None,
) -> Solved:
    """Solve z = f(z), with a residual, history and stop of its own for each position.

    Each position may depend on itself and on earlier ones in its row. It freezes when it is within the
    tolerance, is evaluated again at the rechecks, and is final once it and all positions before it have
    passed.

    Args:
        f: map of (B, T, C) to the same shape. If it has a method `part(rows, begin)`, that gives f at these
            rows and at times from `begin` on; the other positions keep the states at which f was last
            evaluated.
        z0: starting state, (B, T, C).
        real: (B, T) bool; the other positions stay at z0, and no real one depends on them.
        options: see `SolveOptions`.
        preconditioner: P; None: the identity.
    """
    return _Solve(f, z0, real, options, preconditioner).run()


class _Solve:
    """One solve; what is known of each position is a row of tensors (n, ...), n = B*T."""

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        z0: Tensor,
        real: Tensor,
        options: SolveOptions,
        preconditioner: Preconditioner | None,
    ) -> None:
        self.f, self.shape, self.dtype, self.options = f, z0.shape, z0.dtype, options
        self.preconditioner = preconditioner
        z = z0.reshape(-1, z0.shape[-1])
        self.z = self.best = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        self.real = real.reshape(-1)
        n, device = z.shape[0], z.device
        self.limit = options.atol * z.shape[1] ** 0.5
        inf = torch.full((n,), float("inf"), dtype=torch.float64, device=device)
        count, no = inf.new_zeros(n, dtype=torch.int32), torch.zeros_like(self.real)
        self.best_distance = self.first_distance = self.last_distance = inf  # of |f(z) - z|
        self.best_size = torch.ones_like(inf)  # |f(z)| at the best state
        self.tau = torch.full_like(inf, options.damping)
        self.since_best = self.restarts = self.evaluations = count
        self.moving, self.final = self.real, ~self.real
        self.abandoned = self.restarted = self.plain = self.alone = no
        slots = options.memory - 1 if options.solver == "anderson" else 0
        self.history = History(self.z, slots, coupled=self.shape[1] > 1) if slots else None
        self._widen()

    def run(self) -> Solved:
        budget, coupled = self.options.max_evals, self.shape[1] > 1
        again = rechecks(budget) if coupled else set()
        for k in range(budget):
            if k in again:
                self._iterate(recheck=True)
            elif bool(self.moving.any()):
                self._iterate(recheck=False)
            elif self.history is not None:
                self.history.skip()
            if bool(self.final.all()) if coupled else not bool(self.moving.any()):
                break
        size = torch.where(self.best_size > 1e-30, self.best_size, 1e-30)
        return Solved(
            state=self.best.to(self.dtype).view(self.shape),
            residual=(self.best_distance / size).float().view(self.shape[:-1]),
            evaluations=self.evaluations.view(self.shape[:-1]),
            converged=(self.real & ~self.moving & ~self.abandoned).view(self.shape[:-1]),
        )

    def _iterate(self, recheck: bool) -> None:
        """Evaluate f, judge every position, and step those that still move."""
        z, options = self.z, self.options
        if recheck:
            self._widen()
        fz = self._evaluate(z)
        g = fz - z
        distance, size = (torch.linalg.vecdot(x, x).double().sqrt() for x in (g, fz))
        finite = distance < float("inf")
        margin = 1.0 if recheck or self.shape[1] == 1 else MARGIN
        passed = (distance <= margin * self.limit + margin * options.rtol * size) & finite
        distance = torch.where(finite, distance, float("inf"))
        was_moving = self.moving
        if recheck:  # a final position keeps its recorded residual
            distance = torch.where(self.final, self.best_distance, distance)
            size = torch.where(self.final, self.best_size, size)
            passed = torch.where(self.final, ~self.abandoned, passed) | ~self.real
            stale = self._look_again(distance, size, passed)
            self.best = torch.where(stale.unsqueeze(1), z, self.best)
        products = self._observe(z, g)
        better = self._judge(distance, size, passed)
        self.best = torch.where(better.unsqueeze(1), z, self.best)
        ready = (passed | self.abandoned) if recheck else (was_moving & passed)
        by_row = (self.final | ready | ~self.real).view(self.shape[:-1])
        self.final = by_row.int().cumprod(1).bool().view(-1)
        self._step(z, fz, g, products)

    def _evaluate(self, z: Tensor) -> Tensor:
        """f(z), (n, C); where f is narrowed, z itself at all other positions."""
        if self.index is None:
            return self.current(z.to(self.dtype).view(self.shape)).to(z.dtype).reshape(z.shape)
        rows = z.index_select(0, self.index)
        part = rows.to(self.dtype).view(len(self.rows), -1, z.shape[1])
        return z.index_copy(0, self.index, self.current(part).to(z.dtype).reshape(rows.shape))

    def _widen(self) -> None:
        """Evaluate f at all positions from now on."""
        self.current, self.begin = self.f, 0
        self.index: Tensor | None = None
        self.rows = torch.arange(self.shape[0], device=self.z.device)  # in order

    def _narrow(self, moved: Tensor) -> None:
        """Evaluate f only where it is needed from now on, if that saves enough.

        Needed are the rows with a position that `moved`, (n,) bool, and the times from the first of these on.
        """
        if not hasattr(self.f, "part"):
            return
        by_row = moved.view(self.shape[:-1])
        rows, length = by_row.any(1).nonzero().squeeze(1), self.shape[1]
        begin = int(by_row.any(0).int().argmax()) // 16 * 16  # a multiple of 16: see `rowwise_linear`
        if len(rows) * (length - begin) > NARROW * len(self.rows) * (length - self.begin):
            return
        places = torch.searchsorted(self.rows, rows)
        self.current = self.current.part(places, begin - self.begin)  # type: ignore[attr-defined]
        self.rows, self.begin = rows, begin
        times = torch.arange(begin, length, device=rows.device)
        self.index = (rows.unsqueeze(1) * length + times).flatten()

    def _observe(self, z: Tensor, g: Tensor) -> Tensor | None:
        if self.history is None:
            return None
        products = self.history.observe(z, g, self.restarted | self.alone)
        self.restarted = torch.zeros_like(self.restarted)
        return products

    def _judge(self, distance: Tensor, size: Tensor, passed: Tensor) -> Tensor:
        """Record an evaluation, and freeze the positions that pass.

        Returns:
            where the state is the best so far, (n,) bool.
        """
        moving, where = self.moving, torch.where
        better = moving & ((distance < self.best_distance) | passed)
        self.best_distance = where(better, distance, self.best_distance)
        self.best_size = where(better, size, self.best_size)
        self.first_distance = where(torch.isinf(self.first_distance), distance, self.first_distance)
        self.last_distance = where(moving, distance, self.last_distance)
        self.evaluations = self.evaluations + moving
        self.since_best = (self.since_best + moving) * ~better
        self.moving = moving & ~passed
        return better

    def _look_again(self, distance: Tensor, size: Tensor, passed: Tensor) -> Tensor:
        """At a recheck, wake the frozen positions that do not pass any more.

        Returns:
            moving positions whose best residual is out of date, because f has changed: their present state
            becomes the best one, (n,) bool.
        """
        best, where, inf = self.best_distance, torch.where, float("inf")
        unchanged = (distance == best) | ((distance - best).abs() <= MOVED * best)
        self.abandoned = self.abandoned & ~passed & unchanged
        woken = ~self.moving & ~passed & ~self.abandoned
        bound = torch.minimum(10 * best, self.first_distance)
        stale = self.moving & ~passed & (distance >= best) & (distance <= bound)
        known = (~self.moving & passed & self.real) | stale
        self.best_size = where(known, size, self.best_size)
        self.best_distance = where(woken, inf, where(known, distance, best))
        self.first_distance = where(woken, inf, self.first_distance)
        self.since_best, self.restarts = self.since_best * ~woken, self.restarts * ~woken
        self.tau = where(woken, self.options.damping, self.tau)
        self.plain, self.alone = self.plain & ~woken, self.alone & ~woken
        self.restarted, self.moving = self.restarted | woken, self.moving | woken
        return stale

    def _step(self, z: Tensor, fz: Tensor, g: Tensor, products: Tensor | None) -> None:
        """Step the moving positions; lost ones go back to their best state."""
        if self.options.max_evals == 1:  # a single evaluation: f(z0) is the result where it is finite
            finite = torch.isfinite(fz).all(1) & self.moving
            self.best = torch.where(finite.unsqueeze(1), fz, self.best)
            return
        lost = self._send_back()
        if bool(self.moving.any()):
            left, following = g, z
            if self.history is not None:
                left, following = self.history.mix(products, z, g)
            if self.preconditioner is not None:
                left = torch.where(self.plain.unsqueeze(1), left, self.preconditioner(left))
            following = torch.addcmul(following, left, self.tau.to(z.dtype).unsqueeze(1))
            finite = torch.isfinite(following).all(1, keepdim=True)
            following = torch.where(finite, following, fz)
            z = torch.where((self.moving & ~lost).unsqueeze(1), following, z)
            self._narrow(self.moving | lost)
        elif self.history is not None:
            self.history.skip()
        self.z = torch.where(lost.unsqueeze(1), self.best, z)

    def _send_back(self) -> Tensor:
        """Restart the lost positions from their best state, without the history so far.

        The first restart halves the step. The second one takes full steps without P and without a history.
        Then restarts with and without a history alternate, with ever smaller steps and without P. P is also
        left out if the residual has grown by the factor `GROWTH_LIMIT`. After `MAX_RESTARTS` restarts the
        position is abandoned.

        Returns:
            the lost positions, (n,) bool.
        """
        far = (self.last_distance > GROWTH_LIMIT * self.best_distance) | torch.isinf(self.last_distance)
        lost = self.moving & (far | (self.since_best >= PATIENCE))
        number = self.restarts + lost
        even = number % 2 == 0
        self.plain = self.plain | (lost & (far | (number >= 2)))
        self.alone = torch.where(lost, even, self.alone)
        tau = self.options.damping * 0.5 ** ((number + 1) // 2 - even.int()).double()
        self.tau = torch.where(lost, tau, self.tau)
        self.restarts, self.restarted = number, self.restarted | lost
        self.since_best = self.since_best * ~lost
        abandoned = lost & (number > MAX_RESTARTS)
        self.abandoned, self.moving = self.abandoned | abandoned, self.moving & ~abandoned
        return lost
