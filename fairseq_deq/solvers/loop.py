"""The loop around every stepper: evaluation, residuals, freezing, waking, safeguards, the best state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import SolverConfig
from .cost import GatherCost
from .lanes import LaneShape, Restrictable
from .ledger import MOVED, Ledger
from .registry import Stepper, get_solver
from .result import FixedPoint

# From one recheck to the next the number of iterations grows by this factor.
_RECHECK_GROWTH = 1.6
# Without regard to time, rows are left out where that saves at least this share of them.
_LEAST_SAVED = 0.2
# Gathered rows come in multiples of this, so that a matrix product rounds a row the same in any company.
ROW_MULTIPLE = 16


def recheck_iterations(first: int, budget: int) -> set[int]:
    """The iterations of a solve that evaluate every lane: fixed, so that no lane can tell how others fare."""
    iterations, k = {budget - 1}, first
    while k < budget:
        iterations.add(k)
        k = max(k + 1, round(k * _RECHECK_GROWTH))
    return iterations


@dataclass(frozen=True)
class _Measured:
    """|f(z) - z|, inf where not finite, |f(z)|, and whether the former is small enough; (n,) each."""

    distance: Tensor
    size: Tensor
    passed: Tensor


class Loop:
    """One solve. `rows` are the lanes evaluated between rechecks; `z`, `here`, `stepper` belong to them.

    `full`, `best`, `ledger` and `live` cover all lanes; what they hold of the rows is stale until `_spill`,
    save for `best`.

    Args:
        f: map of a tensor to one of the same shape.
        z0: starting state, (..., C).
        config: the options.
        keep_inverse: keep the histories of all lanes, for `inverse_transpose`.
    """

    def __init__(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig, keep_inverse: bool = False
    ) -> None:
        self.f, self.config, self.dtype = f, config, z0.dtype
        self.lanes = LaneShape.of(z0, config.scope)
        z = self.lanes.flatten(z0.detach())
        self.full = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).clone()  # (N, D)
        n, device = self.lanes.count, z.device
        self.best = self.full.clone()
        self.ledger = Ledger.start(n, config.damping, self.full)
        self.live = torch.ones(n, dtype=torch.bool, device=device)  # lanes of samples that have not ended
        self.rows = torch.arange(n, device=device)
        self.z = self.full.clone()
        self.here = Ledger.start(n, config.damping, self.full)
        self.stepper: Stepper = get_solver(config.solver)(config, self.full)
        self.some_fresh, self.damped = True, config.damping < 1
        self.moving_count = n
        self.can_restrict = config.active_set != "never" and isinstance(f, Restrictable)
        self.restricted: Callable[[Tensor], Tensor] | None = None
        self.cost = GatherCost(n)
        self.rechecks = recheck_iterations(config.first_recheck, config.max_evals)
        self.until_recheck = 0
        self.iterations = 0
        self.lane_evaluations = 0
        self.parked: list[tuple[Tensor, Stepper]] | None = [] if keep_inverse else None

    def run(self) -> FixedPoint:
        """Solve."""
        for k in range(self.config.max_evals):
            if self.lanes.coupled:
                self.until_recheck = min(r for r in self.rechecks if r >= k) - k
            else:
                self.until_recheck = self.config.max_evals - k
            if self.lanes.coupled and self.until_recheck == 0:
                self._recheck(k)
                if not bool(self.live.any()):
                    break
            elif self.moving_count:
                self._iterate()
            elif self.lanes.coupled:
                # A lane woken later finds its history where it would be had any other lane been moving.
                self.stepper.skip()
            else:
                break
        self._spill()
        return FixedPoint(
            state=self.lanes.unflatten(self.best).to(self.dtype),
            residual=self.ledger.residual().view(self.lanes.shape),
            evaluations=self.ledger.evaluations.view(self.lanes.shape),
            status=self.ledger.status(self.config.patience).view(self.lanes.shape),
            iterations=self.iterations,
            lane_evaluations=self.lane_evaluations,
        )

    def inverse_transpose(self, vector: Tensor) -> Tensor:
        """The histories' estimate of (I - J)^{-T} `vector`, with J the blocks of single lanes.

        Args:
            vector: shaped as the state.
        Returns:
            likewise.
        """
        assert self.parked is not None
        rows = self.lanes.flatten(vector).to(self.full.dtype)
        estimate = rows.clone()
        moving = self.here.moving.nonzero().squeeze(1)
        live = (self.rows[moving], self.stepper.subset(moving))
        for lanes, stepper in (*self.parked, live):  # what a lane knew when it came to rest for the last time
            product = stepper.inverse_transpose(rows.index_select(0, lanes))
            sound = torch.isfinite(product).all(1, keepdim=True)
            estimate.index_copy_(0, lanes, torch.where(sound, product, rows.index_select(0, lanes)))
        return self.lanes.unflatten(estimate).to(vector.dtype)

    # ------------------------------------------------------------------ iterations

    def _iterate(self) -> None:
        """Evaluate the rows and step."""
        with self.cost.evaluation(self.rows.numel()):
            fz = self._call(self.restricted or self.f, self.z)
            g = fz - self.z
            lost = self._judge(self.here, self.rows, self.z, self._measure(fz, g))
        keep = self._worth_keeping(self.here.moving)
        if keep is not None:
            self._spill()
            self._hold(self.rows[keep], fz := fz[keep], self.z[keep])
            g, lost = g[keep], lost[keep]
        self._step(fz, g, lost)

    def _recheck(self, k: int) -> None:
        """Evaluate every lane of the samples still going; wake lanes, end samples, step the moving lanes."""
        self._spill()
        lanes = (self.live if self.can_restrict else torch.ones_like(self.live)).nonzero().squeeze(1)
        whole = lanes.numel() == self.lanes.count
        with self.cost.evaluation(lanes.numel()):
            z = self.full if whole else self.full.index_select(0, lanes)
            fz = self._call(self.f if whole else self._restrict(lanes, None), z)
            g = fz - z
            measured, here = self._measure(fz, g), self.ledger.rows(lanes)
            self._settle(here, lanes, z, measured)
            lost = self._judge(here, lanes, z, measured)
        self.ledger.put(lanes, here)
        unsettled = lanes[~(measured.passed | here.given_up)]
        going = torch.zeros(self.lanes.samples, dtype=torch.bool, device=lanes.device)
        going[self.lanes.sample_of(unsettled)] = True
        self.live &= going.repeat_interleave(self.lanes.count // self.lanes.samples)
        # Until the next recheck, rows that do not move are kept only where leaving them out does not pay.
        self.until_recheck = min((r for r in self.rechecks if r > k), default=k) - k
        keep = self._worth_keeping(here.moving)
        if keep is not None:
            lanes, fz, g, z, lost = lanes[keep], fz[keep], g[keep], z[keep], lost[keep]
        self._hold(lanes, fz, z)
        self._step(fz, g, lost)

    def _settle(self, here: Ledger, lanes: Tensor, z: Tensor, measured: _Measured) -> None:
        """Wake the frozen lanes that do not pass, and renew what was known of the others.

        The lanes before a lane have moved since its best residual was measured; unless the lane has since
        lost its way, its state now is the better one. That it is no progress still counts against its
        patience. A woken lane starts again: what it rested at solved another equation.
        """
        passed, distance = measured.passed, measured.distance
        best = here.best_distance
        same = (distance == best) | ((distance - best).abs() <= MOVED * best)  # the former where both are inf
        here.given_up &= ~passed & same  # of another equation
        woken = ~here.moving & ~passed & ~here.given_up & self.live[lanes]
        resting = ~here.moving & passed
        # Never worse than the first state: or a lane that grows by less at a time would drift away.
        bound = torch.minimum(10 * best, here.first_distance)
        stale = here.moving & ~passed & (distance >= best) & (distance <= bound)
        self._renew(stale, lanes, z)
        known = resting | stale
        here.best_size = torch.where(known, measured.size, here.best_size)
        here.best_distance = torch.where(known, distance, best).masked_fill(woken, torch.inf)
        here.first_distance = here.first_distance.masked_fill(woken, torch.inf)
        here.peak_distance = here.peak_distance.masked_fill(woken, 0.0)
        here.since_best = here.since_best.masked_fill(woken, 0)
        here.restarts = here.restarts.masked_fill(woken, 0)
        here.tau = here.tau.masked_fill(woken, self.config.damping)
        here.fresh |= woken
        here.moving |= woken
        self.some_fresh = self.some_fresh or bool(woken.any())

    def _judge(self, here: Ledger, lanes: Tensor, z: Tensor, measured: _Measured) -> Tensor:
        """Freeze lanes that pass, keep best states, and tell which lanes have lost their way, (n,) bool."""
        moving = here.moving
        better = here.record(measured.distance, measured.size, measured.passed, self.some_fresh)
        self._renew(better, lanes, z)
        if self.parked is not None:
            self._park(lanes[moving & measured.passed])
        lost = here.lost(self.config.patience)
        self.moving_count, self.lost_count = torch.stack([here.moving.sum(), lost.sum()]).tolist()
        return lost

    def _step(self, fz: Tensor, g: Tensor, lost: Tensor) -> None:
        """Move the rows that move, given f and f(z) - z there; send the lost ones back."""
        here = self.here
        if self.moving_count == 0:
            self.stepper.skip()
            return
        fresh = here.fresh.unsqueeze(1) if self.some_fresh else None
        tau = here.tau.unsqueeze(1) if self.damped else None
        following = self.stepper.step(self.z, fz, g, fresh, tau)
        following = _choose(torch.isfinite(torch.linalg.vector_norm(following, dim=1)), following, fz)
        self.z = _choose(here.moving, following, self.z)
        if self.some_fresh:
            here.fresh = torch.zeros_like(here.fresh)
        self.some_fresh = False
        if self.lost_count:
            self._restart(lost.nonzero().squeeze(1))

    def _restart(self, lost: Tensor) -> None:
        """Send rows back to their best state with half the step and no history; in the end give up."""
        here = self.here
        hopeless = here.restart(lost)
        self.z.index_copy_(0, lost, self.best.index_select(0, self.rows[lost]))
        self.moving_count -= int(hopeless.sum())
        self.some_fresh = self.damped = True

    def _measure(self, fz: Tensor, g: Tensor) -> _Measured:
        size = torch.linalg.vector_norm(fz, dim=1)
        distance = torch.linalg.vector_norm(g, dim=1)
        limit = self.config.atol * fz.shape[1] ** 0.5 + self.config.rtol * size
        passed = (distance <= limit) & (distance < torch.inf)
        return _Measured(distance.nan_to_num_(nan=torch.inf, posinf=torch.inf), size, passed)

    def _park(self, stopped: Tensor) -> None:
        """Keep the histories of lanes that come to rest: the stepper goes on with whatever its rows do."""
        assert self.parked is not None
        if stopped.numel():
            source = torch.searchsorted(self.rows, stopped)
            self.parked.append((stopped, self.stepper.subset(source)))

    def _renew(self, mask: Tensor, lanes: Tensor, z: Tensor) -> None:
        """The best state of the masked rows is z."""
        if mask.device.type == "cpu":
            index = mask.nonzero().squeeze(1)
            self.best.index_copy_(0, lanes[index], z.index_select(0, index))
        else:
            old = self.best.index_select(0, lanes)
            self.best.index_copy_(0, lanes, torch.where(mask.unsqueeze(1), z, old))

    # ------------------------------------------------------------------ evaluation and the active set

    def _call(self, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        n = z.shape[0]
        self.iterations += 1
        self.lane_evaluations += n
        z = z.to(self.dtype)
        fz = f(self.lanes.unflatten(z) if n == self.lanes.count else z.reshape(-1, self.lanes.width))
        return fz.to(self.full.dtype).reshape(n, -1)

    def _restrict(self, lanes: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        with self.cost.restricting():
            z = self.lanes.unflatten(self.full).to(self.dtype)
            value = None if value is None else value.to(self.dtype).reshape(-1, self.lanes.width)
            return self.f.restrict(z, self.lanes.positions(lanes), value)  # type: ignore[attr-defined]

    def _worth_keeping(self, moving: Tensor) -> Tensor | None:
        """Indices of the rows to go on with, where leaving the others out pays; None where it does not."""
        if not self.can_restrict or self.moving_count == 0:
            return None
        now = moving.numel()
        then = min(-(-self.moving_count // ROW_MULTIPLE) * ROW_MULTIPLE, now)
        if self.config.active_set == "always":
            worth = now - then >= _LEAST_SAVED * now
        else:
            worth = self.cost.pays(now, then, self.until_recheck - 1)
        if not worth:
            return None
        # Frozen lanes fill up the last multiple; they are evaluated and ignored.
        order = torch.argsort(moving.to(torch.int8), descending=True, stable=True)
        return order[:then].sort().values

    def _spill(self) -> None:
        """Bring what covers all lanes up to date with the rows."""
        self.full.index_copy_(0, self.rows, self.z)
        self.ledger.put(self.rows, self.here)

    def _hold(self, rows: Tensor, fz: Tensor, z: Tensor) -> None:
        """Make `rows` the lanes that are evaluated between rechecks and whose history is kept.

        Args:
            rows: the lanes, sorted.
            fz, z: f(z) and z there; the state that covers all lanes has z too.
        """
        place = torch.full((self.lanes.count,), -1, dtype=torch.long, device=rows.device)
        place[self.rows] = torch.arange(self.rows.numel(), device=rows.device)
        if rows.numel() != self.rows.numel() or not torch.equal(rows, self.rows):
            self.stepper = self.stepper.subset(place[rows])
        self.rows, self.z, self.here = rows, z.clone(), self.ledger.rows(rows)
        some_but_not_all = self.can_restrict and 0 < rows.numel() < self.lanes.count and self.moving_count > 0
        self.restricted = self._restrict(rows, fz) if some_but_not_all else None


def _choose(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of a where the mask is true, of b elsewhere; a, which is overwritten, or a new tensor."""
    if mask.device.type != "cpu":
        return torch.where(mask.unsqueeze(1), a, b)
    index = (~mask).nonzero().squeeze(1)  # on the CPU several times faster than a broadcast where
    return a.index_copy_(0, index, b.index_select(0, index)) if index.numel() else a
