"""A solve on a GPU whose iterations are recorded as CUDA graphs and replayed, in one launch each."""

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
# Functions and classes of maps that could not be recorded, and why: said once, and not tried again.
refused: dict[str, str] = {}


def can_capture(config: SolverConfig, device: torch.device) -> bool:
    """Whether a solve with these options is recorded on `device`."""
    return config.cuda_graph == "auto" and device.type in RECORDS


class CapturedLoop(Loop):
    """The same solve, with all lanes in every iteration.

    There are two kinds of iteration: plain ones and rechecks. The first of each kind is recorded as a program
    over *buffers*, the tensors that one iteration hands to the next; all later ones replay it. A program
    is recorded once per solve, because f holds the tensors of its batch, and lives as long. What cannot be
    recorded runs launch by launch, and a warning says why.

    The same results as from `Loop` with `active_set="never"`, up to rounding. It is `Loop` itself where the
    solver's iterations differ from each other, where f is one of autograd (`is_taped`), and where a map of
    f's class could not be recorded before.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.places: list[Place] = []
        self.buffers: list[Tensor] = []
        self.programs: dict[str, Callable[[], None]] = {}
        self.launched: set[str] = set()  # kinds that have been run launch by launch
        self.recording = False
        f, alike = self.active.f, getattr(self.active.method, "alike", False)
        self.name = getattr(f, "__qualname__", type(f).__qualname__)
        self.eager = not alike or getattr(f, "is_taped", False) or self.name in refused
        if not self.eager:
            self.active.can_restrict = False

    def run(self, trace: Trace | None = None) -> FixedPoint:
        self.eager = self.eager or trace is not None  # a replay cannot call `trace`
        try:
            return super().run(trace)
        finally:
            # The places refer back to this object. Without this, f, the buffers and the graphs would stay
            # until Python's garbage collector runs, which may be while another graph is recorded.
            self.places, self.buffers, self.programs = [], [], {}

    def _pass(self, k: int, trace: Trace | None) -> None:
        kind = "recheck" if k in self.rechecks else "iteration"
        if self._launches(kind, k) or not self._recorded(kind, k):
            super()._pass(k, trace)
            self.launched.add(kind)
            if self.buffers:  # the programs read the buffers only
                write_back(self._found(), self.buffers)
                self._put(self.buffers)
            return
        self.programs[kind]()
        self.active.count_evaluation()
        if k in self.rechecks:  # a recheck may have woken any lane
            self.moving_count = self.lanes.count
        if super()._asks(k):
            self._ask()

    def _asks(self, k: int) -> bool:
        return not self.recording and super()._asks(k)

    def _launches(self, kind: str, k: int) -> bool:
        """Whether iteration k must run launch by launch, as far as is known before it is recorded."""
        if self.eager or k < _FIRST:
            return True
        if self.fused and kind not in self.launched:  # rules are compiled here, which cannot be recorded
            return True
        return not (self.moving_count or k in self.rechecks)

    def _recorded(self, kind: str, k: int) -> bool:
        """Make the program of a kind of iteration, unless there is one; return whether there is one now."""
        if kind in self.programs:
            return True
        active = self.active
        counted = active.evaluations, active.lane_evaluations, self.moving_count
        try:
            if not self.buffers:
                self.places = self._all_places()
                # Copies of the history, the states and the records: nothing else refers to these tensors.
                self.buffers = [tensor.clone() for tensor in self._found()]
            self.recording = True
            self.programs[kind] = capture(functools.partial(self._program, k), self.buffers)
        except RuntimeError as error:  # of CUDA, out of memory included
            self.eager = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            refused[self.name] = reason
            if isinstance(error, torch.OutOfMemoryError):
                _pool.cache_clear()  # frees the memory that the pool keeps
            logger.warning(
                f"iterations of {self.name} cannot be recorded as a CUDA graph, and run launch by launch: "
                f"{reason}"
            )
        finally:
            self.recording = False
            active.evaluations, active.lane_evaluations, self.moving_count = counted
            self._put(self.buffers)
        if self.eager:
            self.buffers, self.programs = [], {}
        return not self.eager

    def _program(self, k: int, tensors: list[Tensor]) -> list[Tensor]:
        """Iteration k, as a map from its tensors to those of the next iteration."""
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
                places += [(method, name, i) for i, entry in enumerate(value) if isinstance(entry, Tensor)]
            elif isinstance(value, Tensor):
                places.append((method, name, None))
        return places


def capture(program: Program, buffers: list[Tensor]) -> Callable[[], None]:
    """Record `program`, and return a function that replays it and writes its results to `buffers`.

    Raises:
        RuntimeError: the program waits for the host, or does something else that CUDA cannot record.
    """
    device = buffers[0].device
    # Programs of a pool share memory, so they must not run at the same time: each stream has its own pool.
    pool = _pool(device, torch.cuda.current_stream(device).cuda_stream)
    return pool.record(lambda: write_back(program(buffers), buffers)).replay


def write_back(found: list[Tensor], buffers: list[Tensor]) -> None:
    """Copy the results of a program to the buffers. A result may be a buffer, the same one or another."""
    changed = [i for i, (tensor, buffer) in enumerate(zip(found, buffers)) if tensor is not buffer]
    at = {_address(buffers[i]): i for i in changed}
    # A buffer that is the result for a later one is copied first, before it is overwritten.
    kept = [found[i].clone() if at.get(_address(found[i]), i + 1) <= i else found[i] for i in changed]
    for i, tensor in zip(changed, kept):
        buffers[i].copy_(tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Pool:
    """What recording needs: a stream of its own, and memory that is kept from one program to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.handle = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            # cuBLAS allocates its workspace at the first call on a stream, which must not be recorded.
            self.ones = torch.ones(8, 8, device=device)
            torch.addmm(self.ones[0], self.ones, self.ones)
            self.holder = self._record_nothing()  # while it lives, the pool keeps its memory

    def record(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of the launches of `run`. Recording does not execute them.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            graph = self._begun()
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to report
                    self._end(graph)
                raise
            self._end(graph)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return graph

    def _begun(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may use CUDA freely while this one records.
        graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # After a recording that failed, torch still believes that it is recording to this pool: freed
            # memory does not come back, the next recording to the pool fails, and so does drawing random
            # numbers. Release the pool, and make one recording that succeeds, which resets the generator.
            lost, self.handle = self.handle, torch.cuda.graph_pool_handle()
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, lost)
                torch._C._cuda_releasePool(self.device.index, lost)
            with suppress(RuntimeError):
                self.holder = self._record_nothing()
            raise

    def _record_nothing(self) -> torch.cuda.CUDAGraph:
        graph = self._begun()
        self.ones + 1  # torch warns of an empty graph
        graph.capture_end()
        return graph


@functools.cache
def _pool(device: torch.device, stream: int) -> _Pool:
    return _Pool(device)
