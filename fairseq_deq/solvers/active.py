"""The lanes that a solve evaluates at the moment (the active ones), and the stored states of all lanes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..invariant_matmul import padded_count
from .config import SolverConfig
from .lanes import LaneLayout
from .record import Array, LaneRecord, books_on_host, namespace
from .registry import Method, get_solver
from .result import FixedPoint
from .rows import choose_rows, to_index

# `Restrictable.restrict`.
Restriction = Callable[[Tensor, Tensor, Tensor | None], Callable[[Tensor], Tensor]]

# In evaluations of all lanes, as measured: what one at some lanes costs (a constant, and so much for their
# share), and what making the map at fewer lanes costs, which they must save again before the next recheck.
# Only so many evaluations are counted on, since fewer and fewer lanes move.
_SOME_LANES, _PRICE, _COUNTED_ON = (0.1, 1.1), 0.4, 3
# At a recheck the map at all lanes is there already: it is taken unless fewer than this share is open.
_OPEN_SHARE = 0.5
# Where lanes are independent, fewer of them must leave out this share: of samples, and of single positions,
# where f has the keys and values of a text for each, which are copied.
_LEAST_SHARE, _LEAST_SHARE_OF_TEXTS = 0.25, 0.75


class ActiveLanes:
    """f and the state of its active lanes: those that are evaluated between rechecks.

    Attributes:
        rows: the active lanes, sorted; None: all.
        z: their states, (n, D); never changed in place.
        best: their best states so far, (n, D), likewise.
        record: their `LaneRecord`.
        method: the solver, with the history of these lanes; brought up to date when it is read.
        evaluations, lane_evaluations: evaluations of f so far, and the sum of the lanes evaluated in each.
        all_z, all_best, all_records: the same for all lanes; `scatter` brings the active ones up to date.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> None:
        self.f, self.config, self.dtype = f, config, z0.dtype
        self.lanes = LaneLayout.of(z0, config.scope)
        z = self.lanes.flatten(z0.detach())
        self.z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        self.best = self.z
        self.on_host = books_on_host(z.device)
        self.record = LaneRecord.start(self.lanes.count, config.damping, z.device)
        self.rows: Array | None = None
        self._method: Method = get_solver(config.solver)(
            config.for_lanes(self.lanes.coupled), self.z, self.record.tau
        )
        self._method_rows = self.rows
        self.all_z, self.all_best, self.all_records = self.z, self.best, self.record
        # Asked for by name: `isinstance` of a protocol costs as much as an evaluation for one token.
        self._restrict: Restriction | None = getattr(f, "restrict", None)
        self.can_restrict = config.active_set != "never" and self._restrict is not None
        self.least_share = 0.0
        if config.active_set == "auto":
            self.least_share = _LEAST_SHARE if config.scope != "position" else _LEAST_SHARE_OF_TEXTS
        self.evaluations = 0
        self.lane_evaluations = 0
        self._current = f  # f at the active lanes
        # Autocast is for f alone: what the solve computes itself keeps its precision.
        self._device = z.device.type
        self._autocast = torch.is_autocast_enabled(self._device)
        self._low = torch.get_autocast_dtype(self._device)

    @property
    def method(self) -> Method:
        if self._method_rows is not self.rows:
            self._method = self._method.subset(self._places())
            self._method_rows = self.rows
        return self._method

    def evaluate(self) -> Tensor:
        """f at the active lanes, (n, D).

        Raises:
            ValueError: the first evaluation shows that f is no map of a tensor to one of its shape.
        """
        z = self.z.to(self.dtype)
        z = self.lanes.unflatten(z) if self.rows is None else z.reshape(-1, self.lanes.width)
        first = self.evaluations == 0
        version = z._version if first and not z.is_inference() else None
        with self.autocast(True):
            fz = self._current(z)
        if first:
            check_contract(z, fz, version)
        self.count_evaluation()
        return fz.to(self.z.dtype).reshape(self.z.shape)

    def count_evaluation(self) -> None:
        """Count one evaluation of f at the active lanes."""
        self.evaluations += 1
        self.lane_evaluations += len(self.record.moving)

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        """Autocast on or off, where the solve was started under it."""
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._low, enabled=enabled)

    def precision(self) -> tuple[bool, torch.dtype]:
        """Whether f is evaluated under autocast, and to which type."""
        return self._autocast, self._low

    def use(self, f: Callable[[Tensor], Tensor]) -> None:
        """Evaluate `f` from now on, at all lanes."""
        self.f = self._current = f

    def whole(self) -> Tensor:
        """The state of all lanes, (..., C): the active ones now, the others as they were when last active."""
        z = self.z if self.rows is None else self.all_z.index_copy(0, to_index(self.rows, self.z), self.z)
        return self.lanes.unflatten(z.clone()).to(self.dtype)

    def renew_best(self, mask: Array) -> None:
        """Make z the best state of the active lanes in the mask."""
        if not self.on_host:
            self.best = choose_rows(mask, self.z, self.best)
            return
        count = np.count_nonzero(mask)
        if count == len(mask):
            self.best = self.z
        elif count:
            self.best = choose_rows(mask, self.z.clone(), self.best)  # which rows are written to

    def lanes_at(self, places: Array) -> Array:
        """The lanes at `places` among the active ones."""
        return places if self.rows is None else self.rows[places]

    def of_active(self, values: Array) -> Array:
        """The entries of the active lanes, from an array over all lanes."""
        return values if self.rows is None else values[self.rows]

    def of_all(self, mask: Array) -> Array:
        """A mask over the active lanes as a mask over all lanes."""
        if self.rows is None:
            return mask
        full = self.all_records.moving & False
        full[self.rows] = mask
        return full

    def result(self, patience: int) -> FixedPoint:
        """The outcome of the solve for all lanes."""
        self.scatter()
        record, shape = self.all_records, self.lanes.shape

        def tensor(values: Array, dtype: torch.dtype) -> Tensor:
            return (values if isinstance(values, Tensor) else torch.from_numpy(values)).to(dtype).view(shape)

        return FixedPoint(
            state=self.lanes.unflatten(self.all_best).to(self.dtype),
            residual=tensor(record.residual(), self.z.dtype),
            lane_nfe=tensor(record.evaluations, torch.int32),
            status=tensor(record.status(patience), torch.uint8),
            nfe=self.evaluations,
            total_lane_nfe=self.lane_evaluations,
        )

    # ------------------------------------------------------------------ which lanes are active

    def worth_keeping(self, moving_count: int, evaluations: int) -> Array | None:
        """Places of the active lanes to keep evaluating; None: all, since dropping some saves no time.

        Args:
            moving_count: how many active lanes still move.
            evaluations: evaluations before the next recheck.
        """
        moving = self.record.moving
        now, then = len(moving), moving_count
        if not self.can_restrict:
            return None
        if self.lanes.coupled:
            then = min(padded_count(then), now)
            saved = self._cost(now) - self._cost(then)
            if saved * min(evaluations, _COUNTED_ON) <= _PRICE:
                return None
        elif now == then or now - then < self.least_share * now:
            return None
        # Frozen lanes fill up the last multiple; they are evaluated and ignored.
        if isinstance(moving, Tensor):
            return moving.int().argsort(descending=True, stable=True)[:then].sort().values
        return np.sort(np.argsort(~moving, kind="stable")[:then])

    def _cost(self, lanes: int) -> float:
        """Cost of an evaluation at so many lanes, as a multiple of one at all lanes."""
        constant, slope = _SOME_LANES
        return 1.0 if lanes == self.lanes.count else constant + slope * lanes / self.lanes.count

    def open_lanes(self, final: Array) -> Array | None:
        """The lanes that a recheck evaluates: those that are not final, or None, all of them.

        Args:
            final: (N,) bool.
        """
        if not self.can_restrict:
            return None
        lanes = namespace(final).where(~final)[0]
        return None if padded_count(len(lanes)) > _OPEN_SHARE * self.lanes.count else lanes

    def scatter(self) -> None:
        """Copy the active lanes into the arrays that cover all lanes."""
        if self.rows is None:
            self.all_z, self.all_best, self.all_records = self.z, self.best, self.record
            return
        index = to_index(self.rows, self.z)
        self.all_z = self.all_z.index_copy(0, index, self.z)
        self.all_best = self.all_best.index_copy(0, index, self.best)
        self.all_records.put(self.rows, self.record)

    def activate(self, rows: Array | None, fz: Tensor | None = None) -> None:
        """Make `rows` the active lanes, after `scatter`.

        Args:
            rows: the lanes, sorted; None: all.
            fz: f there, if it is known, (n, D).
        """
        self.rows, self._current = rows, self.f  # the map so far need not be kept while the next one is made
        if rows is None:
            self.z, self.best, self.record = self.all_z, self.all_best, self.all_records
            return
        if fz is not None:
            _ = self.method  # goes on with fewer lanes, and less memory, before the map is made
        index = to_index(rows, self.z)
        self.z, self.best = self.all_z.index_select(0, index), self.all_best.index_select(0, index)
        self.record = self.all_records.rows(rows)
        state = self.lanes.unflatten(self.all_z).to(self.dtype)
        value = None if fz is None else fz.to(self.dtype).reshape(-1, self.lanes.width)
        assert self._restrict is not None
        with self.autocast(True):
            self._current = self._restrict(state, self.lanes.positions(index), value)

    def _places(self) -> Array:
        """The place of each active lane in the method's history, -1 where it has none."""
        rows, known = self.rows, self._method_rows
        if known is None:
            return rows
        moving = self.all_records.moving
        xp = namespace(moving)
        places = xp.zeros_like(moving, dtype=xp.int64) - 1
        places[known] = xp.arange(len(known), **({} if xp is np else {"device": moving.device}))
        return places if rows is None else places[rows]


def check_contract(z: Tensor, fz: Any, version: int | None) -> None:
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
