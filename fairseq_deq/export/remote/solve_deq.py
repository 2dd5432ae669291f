"""Fixed points z = f(z) of independent or causally coupled positions, by Anderson acceleration.

Part of a model that fairseq_deq exported (MIT licence). It finds what the package's own solver finds, by the
same steps, with one thing left out: f is evaluated at all positions, and not at those alone that still move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .options_deq import SolveOptions

# A position whose residual exceeds its best by this factor goes back to its best state.
GROWTH_LIMIT = 1e3
# Evaluations without a new best residual after which a position goes back, and how often one may.
PATIENCE, MAX_RESTARTS = 6, 6
# Where the residual of a position at rest has changed by this share, what it depends on has moved.
MOVED = 0.01
# Ridge of the least squares, relative to the squared norms of its columns.
RIDGE = 1e-3
# Positions at rest are evaluated again from this iteration on, then at these distances at least.
FIRST_RECHECK, RECHECK_GAP, RECHECK_SHARE = 12, 5, 0.25


@dataclass(frozen=True)
class Solved:
    """The outcome of a solve.

    Attributes:
        state: the best state found, (B, T, C).
        residual: |f(z) - z| / |f(z)| there, (B, T); inf where f was never finite.
        evaluations: of f, while the position was moving, (B, T).
        converged: (B, T) bool.
    """

    state: Tensor
    residual: Tensor
    evaluations: Tensor
    converged: Tensor


class Preconditioner:
    """P = I + left right^T of every row, close to the inverse of I minus the mean Jacobian of f.

    Args:
        left, right: (C, r).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    def __call__(self, rows: Tensor) -> Tensor:
        """P of rows (n, C)."""
        inside = rowwise_linear(rows, self.right.T.to(rows.dtype))
        return rows + rowwise_linear(inside, self.left.to(rows.dtype))


def rowwise_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (n, K) @ weight (M, K)^T + bias; in multiples of 16 rows each rounds the same in any company."""
    n = rows.shape[0]
    missing = -n % 16
    return F.linear(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight, bias)[:n]


def rechecks(budget: int) -> set[int]:
    """The iterations that look again at positions at rest; they depend on the budget alone, so that no
    position depends on those after it."""
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
    """Solve z = f(z), position by position.

    A position may depend on itself and on those before it in its row. It rests when it is within the
    tolerance, is looked at again at the rechecks, and is done with when all before it are.

    Args:
        f: map of (B, T, C) to the same shape.
        z0: where to start, (B, T, C).
        real: (B, T) bool; the other positions stay at z0. No real one depends on them.
        options: see `SolveOptions`.
        preconditioner: P, None: the identity.
    """
    return _Solve(f, z0, real, options, preconditioner).run()


@torch.no_grad()
def solve_recurrence(
    column: Callable[[Tensor, int], tuple[Callable[[Tensor], Tensor], Tensor]],
    z0: Tensor,
    real: Tensor,
    options: SolveOptions,
    preconditioner: Preconditioner | None = None,
) -> Solved:
    """Solve z_t = f_t(z_t) one position after another, each from those before it, which are left for good.

    Args:
        column: from the states (B, T, C), settled before t, and t, to f_t as a map of the `own` leading
            channels (B, own) to all (B, C), and to where its solve starts, (B, own).
        z0: states where f is never finite, (B, T, C).
        real, options, preconditioner: as for `solve`.
    """
    states, parts = z0.clone(), []
    for t in range(z0.shape[1]):
        f, start = column(states, t)
        own = _Column(f, start.shape[-1])
        part = solve(own, start.unsqueeze(1), real[:, t : t + 1], options, preconditioner)
        kept = torch.isfinite(part.residual) & real[:, t : t + 1]
        states[:, t] = torch.where(kept, own.whole(part.state), states[:, t])
        parts.append(part)
    residual, evaluations, converged = (
        torch.cat([getattr(part, name) for part in parts], 1)
        for name in ("residual", "evaluations", "converged")
    )
    return Solved(states, residual, evaluations, converged)


class _Column:
    """f at one position as a map of its own channels, (B, 1, own) to the same; the others follow from them."""

    def __init__(self, f: Callable[[Tensor], Tensor], own: int) -> None:
        self.f, self.own = f, own
        self.last: tuple[Tensor, Tensor] | None = None  # a state, and all channels of f there

    def __call__(self, x: Tensor) -> Tensor:
        self.last = (x, self.f(x[:, 0]))
        return self.last[1][:, None, : self.own]

    def whole(self, x: Tensor) -> Tensor:
        """The state `x` (B, 1, own) and the channels that follow from it, (B, C)."""
        if self.last is None or not torch.equal(self.last[0], x):
            self(x)
        assert self.last is not None
        return torch.cat([x[:, 0], self.last[1][:, self.own :]], 1)


class _Solve:
    """One solve; everything that is known of a position is a row, (n, ...), n = B*T."""

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
        self.history = _History(self.z, slots) if slots else None

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
        """Evaluate f, judge every position, and move those that are to move."""
        z, options = self.z, self.options
        fz = self.f(z.to(self.dtype).view(self.shape)).to(z.dtype).reshape(z.shape)
        g = fz - z
        distance, size = (torch.linalg.vecdot(x, x).double().sqrt() for x in (g, fz))
        finite = distance < float("inf")
        passed = (distance <= self.limit + options.rtol * size) & finite
        distance = torch.where(finite, distance, float("inf"))
        was_moving = self.moving
        if recheck:
            passed = passed | (self.final & ~self.abandoned) | ~self.real
            stale = self._look_again(distance, size, passed)
            self.best = torch.where(stale.unsqueeze(1), z, self.best)
        products = self._observe(z, g)
        better = self._judge(distance, size, passed)
        self.best = torch.where(better.unsqueeze(1), z, self.best)
        ready = (passed | self.abandoned) if recheck else (was_moving & passed)
        by_row = (self.final | ready | ~self.real).view(self.shape[:-1])
        self.final = by_row.int().cumprod(1).bool().view(-1)
        self._step(z, fz, g, products)

    def _observe(self, z: Tensor, g: Tensor) -> Tensor | None:
        if self.history is None:
            return None
        products = self.history.observe(z, g, self.restarted | self.alone)
        self.restarted = torch.zeros_like(self.restarted)
        return products

    def _judge(self, distance: Tensor, size: Tensor, passed: Tensor) -> Tensor:
        """Enter an evaluation, let those rest that pass; where the state is the best so far."""
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
        """Wake those at rest that do not pass any more; where the state is to be the best one known."""
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
        """Move what moves; what is lost goes back to its best state."""
        if self.options.max_evals == 1:  # the one evaluation is made use of where it is finite
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
        elif self.history is not None:
            self.history.skip()
        self.z = torch.where(lost.unsqueeze(1), self.best, z)

    def _send_back(self) -> Tensor:
        """Positions that start again from their best state, without a history; at last they are abandoned.

        The first time with half the step; then by full steps without P and history; from then on in turns,
        with ever smaller steps.
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


class _History:
    """What Anderson acceleration keeps of each row: z' = z - DZ*gamma + tau*P (g - DG*gamma), with DZ, DG the
    differences of the last states and of their g, and gamma = argmin |g - DG*gamma|.

    Args:
        like: states, (n, C).
        slots: differences to keep, m.
    """

    def __init__(self, like: Tensor, slots: int) -> None:
        self.count, self.slots = 0, slots
        self.dz: list[Tensor | None] = [None] * slots
        self.dg: list[Tensor | None] = [None] * slots
        self.gram = like.new_zeros(like.shape[0], slots, slots, dtype=torch.float64)  # DG^T DG
        self.rhs = like.new_zeros(like.shape[0], slots, dtype=torch.float64)  # DG^T g
        self.last: tuple[Tensor, Tensor] | None = None

    def skip(self) -> None:
        """An iteration without a move."""
        self.count += 1

    def observe(self, z: Tensor, g: Tensor, forget: Tensor) -> Tensor | None:
        """Put the newest differences in the oldest slot; <DG_j, DG_new> for all j, and last <DG_new, g>."""
        if self.last is None:
            return None
        i = self.count % self.slots
        self.dz[i], self.dg[i] = z - self.last[0], g - self.last[1]
        if bool(forget.any()):
            kept = ~forget
            for history in (self.dz, self.dg):
                history[:] = [None if d is None else torch.where(kept.unsqueeze(1), d, 0.0) for d in history]
            self.gram, self.rhs = self.gram * kept.view(-1, 1, 1), self.rhs * kept.view(-1, 1)
        new = self.dg[i]
        assert new is not None
        products = [torch.zeros_like(g[:, 0]) if d is None else torch.linalg.vecdot(d, new) for d in self.dg]
        return torch.stack([*products, torch.linalg.vecdot(new, g)], 1).double()

    def mix(self, products: Tensor | None, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """g - DG*gamma and z - DZ*gamma."""
        self.last = (z, g)
        if products is None:
            return g, z
        i = self.count % self.slots
        self.count += 1
        row = products[:, :-1]
        self.gram, self.rhs = self.gram.clone(), self.rhs + row  # g has changed by DG_i
        self.gram[:, i], self.gram[:, :, i] = row, row
        self.rhs[:, i] = products[:, -1]
        square = self.gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)  # 1 / lengths of the columns
        system = self.gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        system.diagonal(dim1=1, dim2=2).fill_(1 + RIDGE)
        gamma = torch.linalg.solve_ex(system, self.rhs * scale)[0] * scale
        gamma = torch.where(torch.isfinite(gamma).all(1, keepdim=True), gamma, 0.0).to(z.dtype)
        for j, (dz, dg) in enumerate(zip(self.dz, self.dg)):
            if dz is not None and dg is not None:
                weight = gamma[:, j, None]
                z, g = torch.addcmul(z, dz, weight, value=-1), torch.addcmul(g, dg, weight, value=-1)
        return g, z
