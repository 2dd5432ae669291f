"""The loop of every solve: evaluate f, judge each lane, freeze, wake, restart, step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

from .config import SolverConfig
from .invariant_matmul import padded_count
from .lanes import LaneLayout, Restrictable, direction_of
from .preconditioner import Preconditioner
from .record import Array, LaneRecord, books_on_host, namespace
from .registry import Method, get_solver
from .result import FixedPoint
from .rows import choose_rows, select_rows, to_index

# From one recheck to the next: iterations at least, and the share of those behind at least.
_RECHECK_GAP, _RECHECK_SHARE = 5, 0.25
# Evaluations at fewer lanes must save this many evaluations of all lanes before the next recheck, since the
# map at those lanes has to be made; where lanes are independent, they must leave out this share of them.
_PRICE = 0.25
_LEAST_SHARE = {"always": 0.0, "auto": 0.25}
# Off the CPU the host asks once in so many iterations how many lanes still move.
_ASK_EVERY = 4


def recheck_iterations(first: int, budget: int) -> list[int]:
    """The iterations of a solve that evaluate every lane that is not final; they depend on the budget alone,
    never on residuals, so that no lane depends on lanes after it or on other samples."""
    iterations, k = [], first
    while k < budget - 1:
        iterations.append(k)
        k += max(_RECHECK_GAP, round(k * _RECHECK_SHARE))
    return [*iterations, budget - 1]


@dataclass(frozen=True)
class _Measured:
    """|f(z) - z|, inf where not finite, |f(z)|, and whether the former is small enough; (n,) each."""

    distance: Array
    size: Array
    passed: Array


class Loop:
    """One solve.

    Lanes are *moving*, *frozen* (within the tolerance when last evaluated) or *final* (frozen for good).
    Independent lanes are final when they pass. Lanes of one sample may depend on each other: a frozen one is
    evaluated again at the rechecks, and woken if it does not pass any more. If f says which positions come
    first (`direction`), a lane is final as soon as it passes where all lanes before it are final.

    `rows` are the active lanes, those evaluated between rechecks; `z`, `best`, `record` and `method` belong to
    them. The `all_*` cover all lanes, and are out of date for the active ones until `_scatter`.

    Args:
        f: map of a tensor to one of the same shape.
        z0: starting state, (..., C).
        config: the options.
        preconditioner: what is known of f beforehand; None: nothing.
        keep_inverse: keep the histories of all lanes, for `inverse_transpose`.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        z0: Tensor,
        config: SolverConfig,
        preconditioner: Preconditioner | None = None,
        keep_inverse: bool = False,
    ) -> None:
        self.f, self.config, self.dtype = f, config, z0.dtype
        self.lanes = LaneLayout.of(z0, config.scope)
        z = self.lanes.flatten(z0.detach())
        self.z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z  # (n, D), never written to
        self.best = self.z
        self.on_host = books_on_host(z.device)
        self.preconditioner = None if preconditioner is None else preconditioner.to(self.z)
        self.record = LaneRecord.start(self.lanes.count, config.damping, z.device)
        self.method: Method = get_solver(config.solver)(config, self.z, self.record.tau)
        self.rows: Array | None = None  # None: all lanes
        self.all_z, self.all_best, self.all_records = self.z, self.best, self.record
        self.final = ~self.record.moving
        self.moving_count = self.lanes.count  # as last asked for
        self.can_restrict = config.active_set != "never" and isinstance(f, Restrictable)
        self.current = f  # f at the active lanes
        rechecks = recheck_iterations(config.first_recheck, config.max_evals)
        self.rechecks = dict.fromkeys(rechecks if self.lanes.coupled else [])  # in their order
        self.limit = config.atol * self.z.shape[1] ** 0.5
        self.evaluations = 0
        self.lane_evaluations = 0
        self.frozen_histories: list[tuple[Array, Method]] | None = [] if keep_inverse else None
        # Autocast is for f alone: what the solve computes itself keeps its precision.
        kind = z.device.type
        self.autocast = torch.is_autocast_enabled(kind)
        self.autocast_options = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}

    def run(self) -> FixedPoint:
        """Solve."""
        with self._in_precision_of_f(False), np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for k in range(self.config.max_evals):
                if k in self.rechecks:
                    self._recheck(k)
                elif self.moving_count:
                    self._iterate(k)
                else:  # nothing moves before the next recheck
                    self.method.skip()
                if self._ended(k):
                    break
            return self._result()

    def inverse_transpose(self, vector: Tensor) -> Tensor:
        """The histories' estimate of (I - J)^{-T} `vector`, with J the blocks of single lanes.

        Args:
            vector: shaped as the state.
        Returns:
            likewise.
        """
        assert self.frozen_histories is not None
        rows = self.lanes.flatten(vector).to(self.z.dtype)
        transposed = None if self.preconditioner is None else self.preconditioner.transposed
        estimate = rows.clone()
        moving = namespace(self.record.tau).where(self.record.moving)[0]
        live = (moving if self.rows is None else self.rows[moving], self.method.subset(moving))
        for lanes, method in (*self.frozen_histories, live):  # what a lane knew when it was last frozen
            own = rows.index_select(0, to_index(lanes, rows))
            product = method.inverse_transpose(own, transposed or _identity)
            sound = torch.isfinite(product).all(1, keepdim=True)
            estimate.index_copy_(0, to_index(lanes, rows), torch.where(sound, product, own))
        return self.lanes.unflatten(estimate).to(vector.dtype)

    # ------------------------------------------------------------------ iterations

    def _iterate(self, k: int) -> None:
        """Evaluate the active lanes and step."""
        fz = self._evaluate(self.current, self.z)
        g = fz - self.z
        products = self._observe(g)
        *products, g_square, f_square = self._to_books([*products, vecdot(g, g), vecdot(fz, fz)])
        measured = self._measured(g_square, f_square)
        was_moving = self.record.moving
        self._judge(measured)
        if self.lanes.coupled:
            self._finish(was_moving & measured.passed)
        self._step(k, fz, g, products)

    def _recheck(self, k: int) -> None:
        """Evaluate every lane that is not final, wake those that do not pass any more, and step."""
        self._scatter()
        lanes = self._open_lanes()
        if lanes is not None and not len(lanes):
            return  # all are final, which the device has not been asked yet
        self._activate(lanes)
        fz = self._evaluate(self.current, self.z)
        g = fz - self.z
        measured = self._measured(*self._to_books([vecdot(g, g), vecdot(fz, fz)]))
        final = self.final if self.rows is None else self.final[self.rows]
        passed = measured.passed | (final & ~self.record.abandoned)
        measured = _Measured(measured.distance, measured.size, passed)
        renewed, _ = self.record.recheck(measured.distance, measured.size, passed, self.config.damping)
        self._renew_best(renewed)
        products = list(self._to_books(self._observe(g)))
        self._judge(measured)
        self._finish(passed | self.record.abandoned)
        self._step(k, fz, g, products)

    def _observe(self, g: Tensor) -> list[Tensor]:
        restarted: Array | None = self.record.restarted
        if self.on_host and not restarted.any():
            restarted = None
        products = self.method.observe(self.z, g, restarted, self._precondition)
        if restarted is not None:
            self.record.restarted = self.record.restarted & False
        return products

    def _to_books(self, columns: list[Tensor]) -> Any:
        """Columns (n,) as one array (k, n) of the books, in float64, in one transfer."""
        if not columns:
            return []
        stacked = torch.stack(columns)
        return stacked.numpy().astype(np.float64) if self.on_host else stacked.double()

    def _measured(self, g_square: Array, f_square: Array) -> _Measured:
        xp = namespace(g_square)
        distance, size = xp.sqrt(g_square), xp.sqrt(f_square)
        finite = xp.isfinite(distance)
        passed = (distance <= self.limit + self.config.rtol * size) & finite
        return _Measured(xp.where(finite, distance, float("inf")), size, passed)

    def _judge(self, measured: _Measured) -> None:
        """Freeze the lanes that pass, and keep best states."""
        moving = self.record.moving
        better = self.record.judge(measured.distance, measured.size, measured.passed)
        self._renew_best(better)
        if self.frozen_histories is not None:
            stopped = namespace(better).where(moving & measured.passed)[0]
            if len(stopped):
                lanes = stopped if self.rows is None else self.rows[stopped]
                self.frozen_histories.append((lanes, self.method.subset(stopped)))

    def _renew_best(self, mask: Array) -> None:
        """The best state of the masked active lanes is z."""
        if self.on_host and not mask.any():
            return
        everyone = self.on_host and mask.all()
        self.best = self.z if everyone else choose_rows(mask, self.z.clone(), self.best)

    def _finish(self, ready: Array) -> None:
        """Lanes that become final: ready ones with none but final ones before them in their sample.

        Args:
            ready: (n,) bool, active lanes that were just found to need no other state as long as the lanes
                that they depend on keep theirs.
        """
        if self.on_host and not ready.any():
            return
        final = self.final | (ready if self.rows is None else self._spread(ready))
        by_sample = final.reshape(self.lanes.samples, -1)
        direction = direction_of(self.f)
        if direction:
            self.final = _up_to_the_first_false(by_sample, direction).reshape(-1)
        else:
            every = by_sample.all(1)[:, None]
            self.final = (self.final.reshape(by_sample.shape) | every).reshape(-1)

    def _step(self, k: int, fz: Tensor, g: Tensor, products: Any) -> None:
        """Move the active lanes that move, given f and f(z) - z there; send lost ones back to their best."""
        lost = self.record.must_restart(self.config.patience)
        some_lost = not self.on_host or bool(lost.any())
        if some_lost:
            self.record.restart(lost, self.preconditioner is not None)
        self._count(k)
        if not self.moving_count:
            self.method.skip()
            self.z = choose_rows(~lost, self.z.clone(), self.best) if some_lost else self.z
            return
        keep = self._worth_keeping(k)
        if keep is not None:
            index = to_index(keep, fz)
            fz, g = fz.index_select(0, index), g.index_select(0, index)
            products, lost = [column[keep] for column in products], lost[keep]
            self._scatter()
            self._activate(keep if self.rows is None else self.rows[keep], fz)
        tau: Array | None = self.record.tau
        if self.on_host and (tau == 1).all():
            tau = None
        columns = namespace(self.record.tau).stack(products) if len(products) else []
        following = self.method.step(columns, self.z, g, tau, self._precondition)
        if not self.on_host or not bool(torch.isfinite(following.sum())):
            sound = torch.isfinite(torch.linalg.vector_norm(following, dim=1))
            following = choose_rows(sound.numpy() if self.on_host else sound, following, fz)
        rest = choose_rows(~lost, self.z.clone(), self.best) if some_lost else self.z
        self.z = choose_rows(self.record.moving & ~lost, following, rest)

    def _precondition(self, rows: Tensor) -> Tensor:
        """P of the active lanes; a lane that was lost with it goes without."""
        if self.preconditioner is None:
            return rows
        plain = self.record.plain
        if self.on_host and plain.all():
            return rows
        return choose_rows(~plain, self.preconditioner(rows), rows)

    # ------------------------------------------------------------------ evaluation and the active lanes

    def _evaluate(self, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        z = z.to(self.dtype)
        z = self.lanes.unflatten(z) if self.rows is None else z.reshape(-1, self.lanes.width)
        version = None if z.is_inference() else z._version
        with self._in_precision_of_f(True):
            fz = f(z)
        if self.evaluations == 0:
            _check_contract(z, fz, version)
        self.evaluations += 1
        self.lane_evaluations += len(self.record.moving)
        return fz.to(self.z.dtype).reshape(self.z.shape)

    def _in_precision_of_f(self, enabled: bool) -> AbstractContextManager[None]:
        return torch.autocast(**self.autocast_options, enabled=enabled) if self.autocast else nullcontext()

    def _open_lanes(self) -> Array | None:
        """The lanes that a recheck evaluates; None: all."""
        if not self.can_restrict:
            return None
        xp = namespace(self.final)
        lanes = xp.where(~self.final)[0]
        return None if padded_count(len(lanes)) >= self.lanes.count else lanes

    def _asks(self, k: int) -> bool:
        """Whether iteration k may wait for the device: the same for every solve of this budget and shape."""
        return self.on_host or k % _ASK_EVERY == _ASK_EVERY - 1 or k in self.rechecks

    def _count(self, k: int) -> None:
        """Ask how many active lanes move."""
        if self._asks(k):
            moving = self.record.moving
            self.moving_count = int(np.count_nonzero(moving)) if self.on_host else int(moving.sum())

    def _ended(self, k: int) -> bool:
        """Whether no lane needs another evaluation."""
        if not self.lanes.coupled:
            return not self.moving_count
        return self._asks(k) and bool(self.final.all())

    def _worth_keeping(self, k: int) -> Array | None:
        """Indices of the active lanes to go on with, where leaving the others out pays; None: all of them."""
        now, then, active_set = len(self.record.moving), self.moving_count, self.config.active_set
        if not self.can_restrict or not self._asks(k):
            return None
        if self.lanes.coupled:
            then = min(padded_count(then), now)
            evaluations = next((r for r in self.rechecks if r > k), k + 1) - k - 1
            if (now - then) * evaluations <= _PRICE * self.lanes.count:
                return None
        elif now == then or now - then < _LEAST_SHARE[active_set] * now:
            return None
        # Frozen lanes fill up the last multiple; they are evaluated and ignored.
        moving = self.record.moving
        order = moving.argsort(descending=True, stable=True) if not self.on_host else np.argsort(~moving, kind="stable")
        return order[:then].sort().values if not self.on_host else np.sort(order[:then])

    def _scatter(self) -> None:
        """Bring what covers all lanes up to date with the active ones."""
        if self.rows is None:
            self.all_z, self.all_best, self.all_records = self.z, self.best, self.record
            return
        index = to_index(self.rows, self.z)
        self.all_z = self.all_z.index_copy(0, index, self.z)
        self.all_best = self.all_best.index_copy(0, index, self.best)
        self.all_records.put(self.rows, self.record)

    def _activate(self, rows: Array | None, fz: Tensor | None = None) -> None:
        """Make `rows` the active lanes, after `_scatter`.

        Args:
            rows: the lanes, sorted; None: all.
            fz: f there, if it is known, (n, D).
        """
        if rows is None:
            if self.rows is not None:
                self.method = self.method.subset(self._places(None))
            self.rows, self.current = None, self.f
            self.z, self.best, self.record = self.all_z, self.all_best, self.all_records
            return
        self.method = self.method.subset(self._places(rows))
        self.rows = rows
        index = to_index(rows, self.z)
        self.z, self.best = self.all_z.index_select(0, index), self.all_best.index_select(0, index)
        self.record = self.all_records.rows(rows)
        state = self.lanes.unflatten(self.all_z).to(self.dtype)
        value = None if fz is None else fz.to(self.dtype).reshape(-1, self.lanes.width)
        with self._in_precision_of_f(True):
            self.current = self.f.restrict(state, self.lanes.positions(index), value)  # type: ignore[attr-defined]

    def _places(self, rows: Array | None) -> Array:
        """Where the lanes `rows` (None: all) stand among the active ones, -1 where they do not."""
        if self.rows is None:
            return rows
        places = self.final.astype(np.int64) if self.on_host else self.final.long()
        places = places * 0 - 1
        places[self.rows] = np.arange(len(self.rows)) if self.on_host else torch.arange(len(self.rows), device=self.z.device)
        return places if rows is None else places[rows]

    def _spread(self, mask: Array) -> Array:
        """A mask of the active lanes as one of all lanes."""
        full = self.final & False
        full[self.rows] = mask
        return full

    def _result(self) -> FixedPoint:
        self._scatter()
        record, shape = self.all_records, self.lanes.shape

        def tensor(values: Array, dtype: torch.dtype) -> Tensor:
            return (values if isinstance(values, Tensor) else torch.from_numpy(values)).to(dtype).view(shape)

        return FixedPoint(
            state=self.lanes.unflatten(self.all_best).to(self.dtype),
            residual=tensor(record.residual(), self.z.dtype),
            lane_nfe=tensor(record.evaluations, torch.int32),
            status=tensor(record.status(self.config.patience), torch.uint8),
            nfe=self.evaluations,
            total_lane_nfe=self.lane_evaluations,
        )


def _identity(rows: Tensor) -> Tensor:
    return rows


def _up_to_the_first_false(flags: Array, direction: int) -> Array:
    """(B, T) bool: true as long as nothing before (direction 1) or after (-1) in the row is false."""
    if isinstance(flags, Tensor):
        flags = flags if direction > 0 else flags.flip(1)
        flags = flags.to(torch.int32).cumprod(1).bool()
        return flags if direction > 0 else flags.flip(1)
    return np.logical_and.accumulate(flags[:, ::direction], 1)[:, ::direction]


def _check_contract(z: Tensor, fz: Any, version: int | None) -> None:
    """Raise ValueError where the first evaluation shows that f is no map of a tensor to one of its shape."""
    problem = ""
    if not isinstance(fz, Tensor):
        problem = f"returned {type(fz).__name__}, and a tensor is needed"
    elif fz.shape != z.shape:
        problem = f"made {tuple(fz.shape)} out of {tuple(z.shape)}, and the shape must stay the same"
    elif not fz.is_floating_point() or fz.device != z.device:
        problem = f"returned {fz.dtype} on {fz.device}, and floating point on {z.device} is needed"
    elif version is not None and z._version != version:
        problem = "changed z in place, and must leave it as it is"
    if problem:
        raise ValueError(f"f {problem}")
