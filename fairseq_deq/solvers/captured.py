"""A solve on a GPU whose iterations are one launch each: recorded as CUDA graphs, and replayed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .config import SolverConfig
from .loop import Loop, Trace
from .result import FixedPoint

logger = logging.getLogger(__name__)

# A program: from tensors to the tensors of the next iteration, in the same order.
Program = Callable[[list[Tensor]], list[Tensor]]
# Where a solve keeps a tensor: the attributes of an object, a name, and an index if that is a list's.
Place = tuple[dict[str, Any], str, int | None]

# The first iteration checks what f is, and the second fills the history: from here on all are alike.
_FIRST = 2
# Kinds of devices that can record.
RECORDS = ("cuda",)


def can_capture(config: SolverConfig, device: torch.device) -> bool:
    """Whether a solve with these options is recorded on `device`."""
    return config.cuda_graph == "auto" and device.type in RECORDS


class CapturedLoop(Loop):
    """The same solve, with all lanes in every iteration.

    There are two kinds of iteration, a plain one and a recheck. Of each kind the first is recorded as a
    program over *buffers*, the tensors that an iteration leaves to the next; all others replay it. A program
    is recorded once per solve, because f holds the tensors of its batch, and lives as long. What cannot be
    recorded goes on launch by launch, and a warning says why.

    The same results as from `Loop` with `active_set="never"`, up to rounding.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.active.can_restrict = False
        self.places: list[Place] = []
        self.buffers: list[Tensor] = []
        self.programs: dict[str, Callable[[], None]] = {}
        self.recording = False
        # Launch by launch: a rule whose iterations differ, and what somebody looks on at.
        self.eager = not getattr(self.active.method, "alike", False) or self.frozen_histories is not None

    def run(self, trace: Trace | None = None) -> FixedPoint:
        self.eager = self.eager or trace is not None
        return super().run(trace)

    def _pass(self, k: int, trace: Trace | None) -> None:
        kind = "recheck" if k in self.rechecks else "iteration"
        if self.eager or k < _FIRST or not (self.moving_count or k in self.rechecks):
            super()._pass(k, trace)
            return
        if kind not in self.programs and not self._record(kind, k):
            super()._pass(k, trace)
            return
        self.programs[kind]()
        self.active.count_evaluation()
        if k in self.rechecks:  # which may have woken any of them
            self.moving_count = self.lanes.count
        if super()._asks(k):
            self._ask()

    def _asks(self, k: int) -> bool:
        return not self.recording and super()._asks(k)

    def _record(self, kind: str, k: int) -> bool:
        """Make the program of a kind of iteration; whether there is one."""
        active = self.active
        if not self.places:
            self.places = self._all_places()
            # The history's, the states' and the books': nobody else holds these tensors.
            self.buffers = [tensor.clone() for tensor in self._found()]
        counted = active.evaluations, active.lane_evaluations, self.moving_count
        self.recording = True
        try:
            self.programs[kind] = capture(functools.partial(self._program, k), self.buffers)
        except Exception as error:
            self.eager = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(f"iterations cannot be recorded as a CUDA graph and go on uncaptured: {reason}")
        finally:
            self.recording = False
            active.evaluations, active.lane_evaluations, self.moving_count = counted
            self._put(self.buffers)
        return not self.eager

    def _program(self, k: int, tensors: list[Tensor]) -> list[Tensor]:
        """Iteration k, as a map of what an iteration leaves to the next."""
        self._put(tensors)
        super()._pass(k, None)
        return self._found()

    def _found(self) -> list[Tensor]:
        return [attributes[name] if i is None else attributes[name][i] for attributes, name, i in self.places]

    def _put(self, tensors: list[Tensor]) -> None:
        for (attributes, name, i), tensor in zip(self.places, tensors):
            if i is None:
                attributes[name] = tensor
            else:
                attributes[name][i] = tensor

    def _all_places(self) -> list[Place]:
        active, record, method = vars(self.active), vars(self.active.record), vars(self.active.method)
        places: list[Place] = [(active, "z", None), (active, "best", None), (vars(self), "final", None)]
        places += [(record, name, None) for name in record]
        for name, value in method.items():
            if isinstance(value, list):
                places += [(method, name, i) for i in range(len(value))]
            elif isinstance(value, Tensor):
                places.append((method, name, None))
        return places


def capture(program: Program, buffers: list[Tensor]) -> Callable[[], None]:
    """What replays `program` over `buffers`: each of them is what the program made of all of them.

    Raises:
        RuntimeError: the program asks the host, or does what CUDA cannot record.
    """
    pool = _pool(buffers[0].device)
    graph = torch.cuda.CUDAGraph()
    pool.stream.wait_stream(torch.cuda.current_stream(buffers[0].device))
    with torch.cuda.stream(pool.stream):
        graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
        try:
            write_back(program(buffers), buffers)
        except BaseException:
            with suppress(RuntimeError):  # it has been told above
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(buffers[0].device).wait_stream(pool.stream)
    return graph.replay


def write_back(found: list[Tensor], buffers: list[Tensor]) -> None:
    """Copy what a program found to the buffers, some of which it may have handed on as they are."""
    places = {id(buffer): i for i, buffer in enumerate(buffers)}
    changed = [(i, tensor) for i, tensor in enumerate(found) if places.get(id(tensor)) != i]
    # A buffer that becomes another one is read before it is written to.
    kept = [(i, tensor.clone() if _is_view_of_one(tensor, buffers) else tensor) for i, tensor in changed]
    for i, tensor in kept:
        buffers[i].copy_(tensor)


def _is_view_of_one(tensor: Tensor, buffers: list[Tensor]) -> bool:
    storage = tensor.untyped_storage().data_ptr()
    return any(buffer.untyped_storage().data_ptr() == storage for buffer in buffers)


class _Pool:
    """Where a device records: a stream, and memory that is kept from one program to the next."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            # The library of matrix products makes its workspace at its first call.
            ones = torch.ones(8, 8, device=device)
            torch.addmm(ones[0], ones, ones)
            self.holder = torch.cuda.CUDAGraph()  # as long as it lives, the memory is not given back
            self.holder.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            ones.add_(1)
            self.holder.capture_end()
        torch.cuda.current_stream(device).wait_stream(self.stream)


@functools.cache
def _pool(device: torch.device) -> _Pool:
    return _Pool(device)
