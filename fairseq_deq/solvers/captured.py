"""A solve on a GPU whose iterations are recorded as CUDA graphs and replayed, in one launch each."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .config import SolverConfig
from .graph_pool import capture, write_back
from .held_tensors import Held, Opaque, held
from .loop import Loop, Trace
from .recordings import Recording, kept, release_recordings
from .result import FixedPoint

logger = logging.getLogger(__name__)

# Where a solve keeps a tensor: the attributes of an object, a name, and an index if that is a list's.
Place = tuple[dict[str, Any], str, int | None]

# Kinds of devices that can record.
RECORDS = ("cuda",)
# Functions and classes of maps that could not be recorded, and why: said once, and not tried again.
refused: dict[str, str] = {}
# Likewise those that hold something whose tensors cannot be found.
opaque: dict[str, str] = {}


def can_capture(config: SolverConfig, device: torch.device) -> bool:
    """Whether a solve with these options is recorded on `device`."""
    return config.cuda_graph == "auto" and device.type in RECORDS


class CapturedLoop(Loop):
    """The same solve, with all lanes in every iteration.

    There are two kinds of iteration: plain ones and rechecks. The first of each kind is recorded as a program
    over *buffers*, the tensors that one iteration hands to the next; all later ones replay it. The first
    iteration of a solve checks what f is, and runs launch by launch, as does the first solve of a kind.

    A map says with `holds_its_tensors` that all tensors which it reads are attributes: its own, or those of
    its attributes; and that it writes to none of which it holds a view. Programs of such a map are kept for
    later solves of its kind (see `recordings`), which copy their tensors to where the programs read them,
    except those that are the same as before by torch's count of writes (which `.data` evades). For other maps
    programs are recorded in each solve. What cannot be recorded runs launch by launch, and a warning says
    why.

    The same results as from `Loop` with `active_set="never"`, up to rounding. It is `Loop` itself where the
    solver's iterations differ from each other, where f is one of autograd (`is_taped`), and where a map of
    f's class could not be recorded before.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.places: list[Place] = []
        self.programs: Recording | None = None
        self.key: Any = None  # of the programs, if they are to be kept
        self.launched: set[str] = set()  # kinds that have been run launch by launch
        self.recording = False
        f, alike = self.active.f, getattr(self.active.method, "alike", False)
        self.name = getattr(f, "__qualname__", type(f).__qualname__)
        self.eager = not alike or getattr(f, "is_taped", False) or self.name in refused
        self.held: Held | None = None
        if not self.eager:
            self.active.can_restrict = False
            if getattr(f, "holds_its_tensors", False) and self.name not in opaque:
                self.held = self._held(f)

    def _held(self, f: Any) -> Held | None:
        """What f and the preconditioner are made of, before f is evaluated, which may give it attributes."""
        try:
            made_of = held((f, self.preconditioner))
            # A number in a tensor of the host would become a constant of the graph.
            if any(tensor.device != self.active.z.device for tensor in made_of.tensors):
                raise Opaque("it holds tensors on another device")
        except Opaque as reason:
            opaque[self.name] = str(reason)
            logger.warning(f"graphs of {self.name} are recorded in each solve: {reason}")
            return None
        return made_of

    def run(self, trace: Trace | None = None) -> FixedPoint:
        self.eager = self.eager or trace is not None  # a replay cannot call `trace`
        try:
            return super().run(trace)
        finally:
            # The places refer back to this object. Without this, f, the buffers and the graphs would stay
            # until Python's garbage collector runs, which may be while another graph is recorded.
            self.places, self.programs, self.held = [], None, None

    def _result(self) -> FixedPoint:
        if self.programs is None:
            return super()._result()
        active = self.active  # what the result keeps of the buffers, which the next solve overwrites
        active.best, active.record.evaluations = active.best.clone(), active.record.evaluations.clone()
        found = super()._result()
        if self.key is not None:
            kept.put(self.key, self.programs)
        return found

    def _pass(self, k: int, trace: Trace | None) -> None:
        kind = "recheck" if k in self.rechecks else "iteration"
        if self._launches(kind, k) or not self._recorded(kind, k):
            super()._pass(k, trace)
            self.launched.add(kind)
            if self.programs is not None:  # they read the buffers only
                write_back(self._found(), self.programs.buffers)
                self._put(self.programs.buffers)
            return
        assert self.programs is not None
        self.programs.replay(kind)
        self.active.count_evaluation()
        if k in self.rechecks:  # a recheck may have woken any lane
            self.moving_count = self.lanes.count
        if super()._asks(k):
            self._ask()

    def _asks(self, k: int) -> bool:
        return not self.recording and super()._asks(k)

    def _launches(self, kind: str, k: int) -> bool:
        """Whether iteration k must run launch by launch, as far as is known before it is recorded."""
        if self.eager or k == 0 or not (self.moving_count or k in self.rechecks):
            return True
        if self.programs is None and not self._begin():
            return True
        assert self.programs is not None
        # A kernel is loaded, and a rule compiled, when it runs for the first time; neither can be recorded.
        # Of a map that is kept, all have run in its first solve, unless a rule is compiled for other shapes.
        cautious = self.fused or self.held is None
        return cautious and not self.programs.has(kind) and (k == 1 or kind not in self.launched)

    def _begin(self) -> bool:
        """Get programs for solves of this kind: kept ones, told the tensors of this solve, or new ones;
        return whether there are any."""
        self.places = self._all_places()
        found = self._found()
        try:
            if self.held is not None:
                self.key = self._kind_of_solve(self.held, found)
                self.programs = kept.take(self.key)
            if self.programs is not None and self.held is not None:
                self.programs.copy_from(found, self.held)
            elif self.held is None or kept.welcomes(self.key):
                # What programs read beside the buffers: no iteration changes it.
                constants = self.tolerance, self.early, self.manner
                self.programs = Recording(found, self.held, constants)
        except torch.OutOfMemoryError as error:
            self._do_without(error)
        if self.programs is None:
            self.eager = True  # for this solve
            return False
        self._put(self.programs.buffers)
        return True

    def _recorded(self, kind: str, k: int) -> bool:
        """Make the program of a kind of iteration, unless there is one; return whether there is one now."""
        programs = self.programs
        assert programs is not None
        if programs.has(kind):
            return True
        active, own = self.active, (self.active.f, self.preconditioner)
        counted = active.evaluations, active.lane_evaluations, self.moving_count
        cached = torch.is_autocast_cache_enabled()
        try:
            self.recording = True
            # A weight that autocast has converted before would be read from its cache, and never again from
            # the weight itself.
            torch.set_autocast_cache_enabled(False)
            f, self.preconditioner = programs.maps() or own
            active.use(f)
            programs.add(kind, capture(functools.partial(self._program, k), programs.buffers))
        except RuntimeError as error:  # of CUDA, out of memory included
            self._do_without(error)
        finally:
            torch.set_autocast_cache_enabled(cached)
            self.recording = False
            active.use(own[0])
            self.preconditioner = own[1]
            active.evaluations, active.lane_evaluations, self.moving_count = counted
            self._put(programs.buffers)
        return not self.eager

    def _do_without(self, error: RuntimeError) -> None:
        """Go on launch by launch: in this solve where memory ran out, else for good."""
        self.eager, self.programs, self.key = True, None, None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError):
            release_recordings()
            logger.warning(f"a solve of {self.name} runs launch by launch, since memory ran out: {reason}")
            return
        refused[self.name] = reason
        logger.warning(
            f"iterations of {self.name} cannot be recorded as a CUDA graph, and run launch by launch: "
            f"{reason}"
        )

    def _kind_of_solve(self, made_of: Held, found: list[Tensor]) -> Any:
        """What must be equal for the same programs to serve: all that decides on the operations."""
        stream = None
        if found[0].device.type == "cuda":
            stream = torch.cuda.current_stream(found[0].device).cuda_stream
        return (
            *(made_of.key, self.active.lanes, self.active.dtype, self.fused, stream),
            # A program knows nothing of the budget, which the host counts.
            replace(self.config, max_evals=1),
            *((name, i) for _, name, i in self.places),
            *((tensor.shape, tensor.dtype) for tensor in found),
            *self.active.precision(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
        )

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
