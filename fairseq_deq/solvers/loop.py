"""The loop of every solve: evaluate f, judge each lane, freeze, wake, restart, step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

from .active import ActiveLanes
from .config import SolverConfig
from .fused import constant, fusing, settled
from .lanes import direction_of
from .preconditioner import Preconditioner
from .record import Array, RestartManner, namespace
from .registry import Method
from .result import FixedPoint
from .rows import choose_rows, to_index
from .schedule import recheck_iterations
from .verdict import Measured, finite_rows, send_back, up_to_the_first_false, verdict

# Between rechecks a lane of a sample freezes at this share of its tolerance, since what it depends on may
# still move. At the next recheck, where the tolerance itself decides, fewer are woken then, and fewer of
# those that depend on them must be looked at once more.
_MARGIN = 0.8
# Off the CPU the host asks once in so many iterations how many lanes still move.
_ASK_EVERY = 4

# Called with the number of evaluations so far and a state (..., C).
Trace = Callable[[int, Tensor], object]


class Loop:
    """One solve.

    Lanes are *moving*, *frozen* (within the tolerance when last evaluated) or *final* (frozen for good).
    Independent lanes are final when they pass. Lanes of one sample may depend on each other: a frozen one is
    evaluated again at the rechecks, and woken if it does not pass any more. If f says which positions come
    first (`direction`), a lane is final as soon as it passes where all lanes before it are final.

    Args:
        f: map of a tensor to one of the same shape.
        z0: starting state, (..., C).
        config: the options.
        preconditioner: an approximate inverse known before the solve; None: none.
        keep_inverse: keep the histories of all lanes, for `inverse_transpose`.
    Raises:
        ValueError: the preconditioner is of another width.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        z0: Tensor,
        config: SolverConfig,
        preconditioner: Preconditioner | None = None,
        keep_inverse: bool = False,
    ) -> None:
        self.config, self.direction = config, direction_of(f)
        self.active = ActiveLanes(f, z0, config)
        self.lanes, self.on_host = self.active.lanes, self.active.on_host
        if preconditioner is not None and preconditioner.width != self.lanes.width:
            raise ValueError(
                f"the preconditioner has {preconditioner.width} channels, and the state {self.lanes.width}"
            )
        self.preconditioner = None if preconditioner is None else preconditioner.to(self.active.z)
        self.final = ~self.active.record.moving  # (N,), of all lanes
        self.moving_count, self.all_final = self.lanes.count, False  # as last asked for
        rechecks = recheck_iterations(config.first_recheck, config.max_evals)
        self.rechecks = dict.fromkeys(rechecks if self.lanes.coupled else [])  # in their order
        tau = self.active.record.tau
        self.fused = fusing(tau) and config.max_evals > 1
        limit, margin = config.atol * self.active.z.shape[1] ** 0.5, _MARGIN if self.lanes.coupled else 1.0
        self.tolerance = constant(limit, tau), constant(config.rtol, tau)  # as `Measured.of` takes it
        self.early = constant(margin * limit, tau), constant(margin * config.rtol, tau)
        self.manner = RestartManner.starting_with(config.damping, self.active.z.device)
        # No lane was sent back or looked at again yet: all have a history, P, and the same step length.
        self.calm = self.on_host
        self.frozen_histories: list[tuple[Array, Method]] | None = [] if keep_inverse else None

    def run(self, trace: Trace | None = None) -> FixedPoint:
        """Solve, and tell `trace` each state that f is to be evaluated at."""
        with self.active.autocast(False), np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for k in range(self.config.max_evals):
                self._pass(k, trace)
                if self._ended():
                    break
            return self._result()

    def _result(self) -> FixedPoint:
        return self.active.result(self.config.patience)

    # ------------------------------------------------------------------ iterations

    def _pass(self, k: int, trace: Trace | None) -> None:
        """Iteration k: a plain one or a recheck."""
        if trace is not None and (k in self.rechecks or self.moving_count):
            trace(self.active.evaluations, self.active.whole())
        if k in self.rechecks:
            self._recheck(k)
        elif self.moving_count:
            self._iterate(k)
        else:  # nothing moves before the next recheck
            self.active.method.skip()

    def _iterate(self, k: int) -> None:
        """Evaluate the active lanes and step."""
        active = self.active
        fz = active.evaluate()
        g = fz - active.z
        products, moving, lost = self._observe(g), active.record.moving, None
        if self.fused:
            entries, measures, better, lost = verdict(
                *(active.record.tau, products, g, fz, *self.early),
                *(active.record, self.config.patience, self.manner),
            )
            measured = Measured(*measures)
            self._keep(moving, measured, better)
        else:
            entries = self._to_books([*products, vecdot(g, g), vecdot(fz, fz)])
            entries, measured = entries[:-2], Measured.of(entries[-2:], *self.early)
            self._judge(measured)
        if self.lanes.coupled:
            self._finish(moving & measured.passed)
        if self._gives_its_one_value(fz):
            return
        lost = self._send_back_lost() if lost is None else lost
        keep = self._whom_to_keep(k)
        if lost is not None and (keep is not None or not self.moving_count):
            active.z = self._sent_back(lost)  # one that is abandoned stays there, and is kept no longer
        if not self.moving_count:
            active.method.skip()
            return
        if keep is not None:
            entries = entries[:, keep] if len(entries) else entries
            lost = None if lost is None else lost[keep]
            fz, g = self._narrow(keep, fz, g)
        self._step(fz, g, entries, lost)

    def _recheck(self, k: int) -> None:
        """Evaluate every lane that is not final, wake those that do not pass any more, and step."""
        active, self.calm = self.active, False
        active.scatter()
        lanes = active.open_lanes(self.final)
        if lanes is not None and not len(lanes):
            self.all_final = True  # which the device has not been asked yet
            return
        active.activate(lanes)
        fz = active.evaluate()
        g = fz - active.z
        squares = self._to_books([vecdot(g, g), vecdot(fz, fz)])
        measured = Measured.of(squares, *self.tolerance)
        measured = measured.keeping(active.of_active(self.final), active.record)
        renewed = active.record.recheck(measured.distance, measured.size, measured.passed, self.manner.tau[0])
        active.renew_best(renewed)
        self._judge(measured)
        self._finish(measured.passed | active.record.abandoned)
        if self._gives_its_one_value(fz):
            return
        # The histories of those that go on are all that is looked at.
        keep = self._whom_to_keep(k)
        if not self.moving_count:
            active.method.skip()
            return
        if keep is not None:
            fz, g = self._narrow(keep, fz, g)
        entries = self._to_books(self._observe(g))
        self._step(fz, g, entries, self._send_back_lost())

    def _observe(self, g: Tensor) -> list[Tensor]:
        """The inner products that the method asks for; lanes that restart lose their history."""
        record, restarted = self.active.record, None
        if not self.calm:
            forgetful = record.restarted | record.alone
            restarted = None if self.on_host and not forgetful.any() else forgetful
        products = self.active.method.observe(self.active.z, g, restarted, self._precondition)
        if restarted is not None:
            record.restarted = record.restarted & False
        return products

    def _to_books(self, columns: list[Tensor]) -> Any:
        """Columns (n,) as one array (k, n) in float64, moved to the record of the lanes in one transfer."""
        if not columns:
            return []
        stacked = torch.stack(columns)
        return stacked.numpy().astype(np.float64) if self.on_host else stacked.double()

    def _judge(self, measured: Measured) -> None:
        """Freeze the lanes that pass, and keep best states."""
        record = self.active.record
        moving = record.moving
        self._keep(moving, measured, record.judge(measured.distance, measured.size, measured.passed))

    def _keep(self, moving: Array, measured: Measured, better: Array) -> None:
        """The states of `better` lanes, and the histories of those that moved and pass."""
        active = self.active
        active.renew_best(better)
        if self.frozen_histories is not None:
            stopped = namespace(moving).where(moving & measured.passed)[0]
            if len(stopped):
                self.frozen_histories.append((active.lanes_at(stopped), active.method.subset(stopped)))

    def _finish(self, ready: Array) -> None:
        """Lanes that become final: ready ones with none but final ones before them in their sample.

        Args:
            ready: (n,) bool, active lanes that were just found to need no other state as long as the lanes
                that they depend on keep theirs.
        """
        if self.on_host and not ready.any():
            return
        by_sample = (self.final | self.active.of_all(ready)).reshape(self.lanes.samples, -1)
        if self.direction:
            self.final = up_to_the_first_false(by_sample, self.direction).reshape(-1)
        else:
            whole = by_sample.all(1)[:, None]
            self.final = (self.final.reshape(by_sample.shape) | whole).reshape(-1)

    def _gives_its_one_value(self, fz: Tensor) -> bool:
        """Whether this is the only evaluation; its value is then the result, where it is finite."""
        if self.config.max_evals == 1:
            usable = self.active.record.moving & finite_rows(fz, self.on_host)
            self.active.best = choose_rows(usable, fz.clone(), self.active.best)
        return self.config.max_evals == 1

    def _send_back_lost(self) -> Array | None:
        """Restart the lanes that must; returns which ones, None if none."""
        record, patience = self.active.record, self.config.patience
        if not self.on_host:
            return send_back(record.moving, record, patience, self.manner)
        # A lane that has just come closer is not lost.
        if not np.count_nonzero(record.since_best):
            return None
        lost, far = record.must_restart(patience)
        if not lost.any():
            return None
        record.restart(lost, far, self.manner)
        self.calm = False
        return lost

    def _step(self, fz: Tensor, g: Tensor, products: Any, lost: Array | None) -> None:
        """Step the moving active lanes, given f and f(z) - z there; restarted ones go back to their best."""
        active = self.active
        record = active.record
        tau: Array | None = record.tau
        if (self.calm and self.config.damping == 1) or (self.on_host and bool((record.tau == 1).all())):
            tau = None
        following = active.method.step(products, active.z, g, tau, self._precondition)
        if not self.on_host:
            assert lost is not None
            active.z = settled(record.moving, lost, active.z, active.best, following, fz)
            return
        if not math.isfinite(float(following.sum())):
            following = choose_rows(finite_rows(following, self.on_host), following, fz)
        if lost is not None:
            active.z = choose_rows(record.moving & ~lost, following, self._sent_back(lost))
            return
        active.z = choose_rows(record.moving, following, active.z)

    def _whom_to_keep(self, k: int) -> Array | None:
        """Which active lanes to keep evaluating (None: all); asks how many move, where that may wait."""
        if self._asks(k):
            self._ask()
            return self.active.worth_keeping(self.moving_count, self._until_recheck(k))
        if k in self.rechecks:  # which may have woken any of them
            self.moving_count = len(self.active.record.moving)
        return None

    def _narrow(self, keep: Array, fz: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Keep only the active lanes at `keep`; returns f and f(z) - z there."""
        active, index = self.active, to_index(keep, fz)
        fz, g = fz.index_select(0, index), g.index_select(0, index)
        active.scatter()
        active.activate(active.lanes_at(keep), fz)
        return fz, g

    def _sent_back(self, lost: Array) -> Tensor:
        """z of the active lanes; for restarted ones their best state."""
        active = self.active
        return choose_rows(~lost, active.z.clone() if self.on_host else active.z, active.best)

    def _precondition(self, rows: Tensor) -> Tensor:
        """P for the active lanes; the identity for a lane that goes on without P."""
        if self.preconditioner is None:
            return rows
        if self.calm:
            return self.preconditioner(rows)
        plain = self.active.record.plain
        if self.on_host and not plain.any():
            return self.preconditioner(rows)
        return choose_rows(~plain, self.preconditioner(rows), rows)

    # ------------------------------------------------------------------ when to look at what

    def _until_recheck(self, k: int) -> int:
        """Evaluations between iteration k and the next recheck."""
        return next((r for r in self.rechecks if r > k), k + 1) - k - 1

    def _asks(self, k: int) -> bool:
        """Whether iteration k may wait for the device: the same for every solve of this budget and shape."""
        due = k % _ASK_EVERY == _ASK_EVERY - 1
        return self.on_host or due or (self.active.can_restrict and k in self.rechecks)

    def _ask(self) -> None:
        """How many active lanes move, and whether all are final; on a device that is one wait."""
        moving = self.active.record.moving
        if self.on_host:
            self.moving_count = int(np.count_nonzero(moving))
            self.all_final = self.lanes.coupled and np.count_nonzero(self.final) == len(self.final)
        else:
            self.moving_count, final = divmod(int(2 * moving.sum() + self.final.all()), 2)
            self.all_final = bool(final)

    def _ended(self) -> bool:
        """Whether no lane needs another evaluation."""
        return self.all_final if self.lanes.coupled else not self.moving_count
