"""Recorded iterations of one kind of solve, and those that are kept for later solves."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .graph_pool import release_pools
from .held_tensors import Held, with_tensors

# Each holds a copy of the tensors that its map reads, of the states and of the history: as much memory as a
# solve. A training has two kinds of solve per shape of a batch, forward and backward.
_KEPT = 16
# Over the last _SEEN solves per recording kept, kinds are remembered, and recordings that were used stay.
_SEEN = 4


class _Source(NamedTuple):
    """Which tensor was copied, and how often it had been written to by then."""

    tensor: weakref.ref[Tensor]
    version: int | None  # None: not known, as of a tensor of inference mode

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(weakref.ref(tensor), None if tensor.is_inference() else tensor._version)

    def is_still(self, before: _Source) -> bool:
        """Whether it is the tensor it was, with the values it had: weights, while a text is generated."""
        same = self.version is not None and self.version == before.version
        return same and self.tensor() is before.tensor()


class Recording:
    """Programs of one kind of solve, with the tensors that they read and write.

    Attributes:
        buffers: what one iteration hands to the next.
        inputs: what the map and the preconditioner read; empty where programs serve a single solve.

    Args:
        found: the tensors of a solve that the buffers begin with.
        made_of: what the map and the preconditioner are made of; None: the programs read the tensors of this
            solve, and serve no other.
        constants: whatever else the programs read, kept alive.
    """

    def __init__(self, found: list[Tensor], made_of: Held | None, constants: Any) -> None:
        with torch.inference_mode(False):  # a tensor that is made in inference mode serves there only
            self.buffers = [tensor.clone() for tensor in found]
            self.inputs = [] if made_of is None else [tensor.detach().clone() for tensor in made_of.tensors]
        self._sources = [] if made_of is None else [_Source.of(tensor) for tensor in made_of.tensors]
        self.constants = constants
        # Never evaluated: an evaluation may give a map attributes that belong to one program.
        self._maps = None if made_of is None else with_tensors(made_of.thing, self.inputs)
        self._programs: dict[str, Callable[[], None]] = {}

    def copy_from(self, found: list[Tensor], made_of: Held) -> None:
        """Begin another solve: the same kind, other values."""
        sources = [_Source.of(tensor) for tensor in made_of.tensors]
        changed = [i for i, source in enumerate(sources) if not source.is_still(self._sources[i])]
        self._sources = sources
        pairs = [*zip(self.buffers, found), *((self.inputs[i], made_of.tensors[i].detach()) for i in changed)]
        by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            by_type.setdefault(pair[0].dtype, []).append(pair)
        for alike in by_type.values():  # of one type, so that a device copies many in one launch
            mine, theirs = zip(*alike)
            torch._foreach_copy_(mine, theirs)

    def maps(self) -> tuple[Any, Any] | None:
        """New objects over `inputs`: the map and the preconditioner to record; None: those of the solve."""
        return None if self._maps is None else with_tensors(self._maps, self.inputs)

    def has(self, kind: str) -> bool:
        """Whether there is a program of that kind of iteration."""
        return kind in self._programs

    def add(self, kind: str, program: Callable[[], None]) -> None:
        """Add the program of a kind of iteration."""
        self._programs[kind] = program

    def replay(self, kind: str) -> None:
        """One iteration."""
        self._programs[kind]()


class Kept:
    """The recordings used last, by the kind of solve. One is taken while a solve uses it.

    A kind of solve is recorded when it comes for the second time: a shape that comes once is not worth it. If
    there are more kinds than can be kept, and all come again and again, those that are kept stay.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()  # the one used last at the end
        self._seen: OrderedDict[Any, None] = OrderedDict()  # kinds that were asked for, likewise
        self._used: dict[Any, int] = {}  # at which question each recording was used last
        self._asked = 0
        self._lock = threading.Lock()

    def take(self, key: Any) -> Recording | None:
        """The recording for this kind of solve, which nobody else gets until it is put back."""
        with self._lock:
            self._asked += 1
            return self._recordings.pop(key, None)

    def welcomes(self, key: Any) -> bool:
        """Whether a recording of this kind is worth making; asked once per solve that has none."""
        with self._lock:
            known = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            while len(self._seen) > _SEEN * self.limit:
                self._seen.popitem(last=False)
            oldest = next(iter(self._recordings), None)
            full = len(self._recordings) >= self.limit
            return known and not (full and self._asked - self._used[oldest] < _SEEN * self.limit)

    def put(self, key: Any, recording: Recording) -> None:
        """Keep a recording; the one that was used longest ago goes where there are too many."""
        with self._lock:
            self._recordings[key], self._used[key] = recording, self._asked
            while len(self._recordings) > self.limit:
                gone, _ = self._recordings.popitem(last=False)
                del self._used[gone]

    def clear(self) -> None:
        """Keep none, and begin anew."""
        with self._lock:
            self._recordings.clear()
            self._seen.clear()
            self._used.clear()

    def __len__(self) -> int:
        return len(self._recordings)


kept = Kept(_KEPT)


def release_recordings() -> None:
    """Free the memory of all recorded solves, that of models which are no longer used included."""
    kept.clear()
    release_pools()
