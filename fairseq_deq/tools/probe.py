"""What happens in a training step: its memory; time, time inside f, evaluations and states of its solves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..solvers import direction_of


@dataclass
class Phase:
    """The forward or the backward solve of one step."""

    seconds: float = 0.0
    inside: float = 0.0  # seconds of those spent in f or in products with its Jacobian
    calls: int = 0
    share: float = 0.0  # evaluations, each weighted by the share of the positions it was made at
    states: list[Tensor] = field(default_factory=list)  # of its solves, one per subsequence

    @property
    def state(self) -> Tensor | None:
        """What they came to, (B, T, C); None where there was no solve."""
        return torch.cat(self.states, 1) if self.states else None


@dataclass
class Probe:
    """Measures what happens in the solves of one step."""

    size: int  # numbers in the state
    phases: dict[str, Phase] = field(default_factory=lambda: {"f": Phase(), "b": Phase()})
    current: Phase | None = None
    depth: int = 0
    backward: bool = False
    returned: list[Tensor] = field(default_factory=list)  # by the method, one per subsequence

    @property
    def final(self) -> Tensor:
        """What the method returned for the whole segment, (B, T, C)."""
        return torch.cat(self.returned, 1)

    def solver(self, solve: Callable[..., Any], state: Callable[[Any], Tensor]) -> Callable[..., Any]:
        """`solve`, timed as the solve of the phase that the step is in."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.current = self.phases["b" if self.backward else "f"]
            synchronize()
            begin = time.perf_counter()
            result = solve(*args, **kwargs)
            synchronize()
            self.current.seconds += time.perf_counter() - begin
            found = state(result).detach()
            # The backward pass comes to the last subsequence first.
            self.current.states.insert(0 if self.backward else len(self.current.states), found)
            self.current = None
            return result

        return timed

    def evaluation(self, f: Callable[..., Any], numbers: Callable[..., int]) -> Callable[..., Any]:
        """`f`, timed as work inside f where a solve asks for it; `numbers` of its arguments are evaluated."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            phase = self.current
            if phase is None or self.depth:
                return f(*args, **kwargs)
            self.depth += 1
            begin = time.perf_counter()
            result = f(*args, **kwargs)
            synchronize()
            phase.inside += time.perf_counter() - begin
            self.depth -= 1
            phase.calls += 1 if numbers(*args) else 0
            phase.share += numbers(*args) / self.size
            return result

        return timed


class ProbedMap:
    """f or its adjoint, whole or at some positions, under a probe; it offers what the map offers."""

    def __new__(cls, f: Any, probe: Probe) -> ProbedMap:
        offered = [kind for kind in (_Restricting, _Adjoining, _Recurring) if hasattr(f, kind.offers)]
        return super().__new__(type("ProbedMap", (*offered, cls), {}))

    def __init__(self, f: Any, probe: Probe) -> None:
        self.probe, self.f = probe, f
        self.direction = direction_of(f)
        self.call = probe.evaluation(f, Tensor.numel)

    def __call__(self, z: Tensor) -> Tensor:
        return self.call(z)


class _Restricting:
    offers = "restrict"

    def restrict(self: Any, *args: Any) -> Callable[..., Any]:
        restricted = self.probe.evaluation(self.f.restrict, lambda *_: 0)(*args)
        return self.probe.evaluation(restricted, Tensor.numel)


class _Adjoining:
    offers = "adjoint"

    def adjoint(self: Any, *args: Any) -> ProbedMap:
        return ProbedMap(self.f.adjoint(*args), self.probe)


class _Recurring:
    offers = "column"

    @property
    def own(self: Any) -> int:
        return self.f.own

    @property
    def order(self: Any) -> Any:
        return self.f.order

    def start(self: Any, *args: Any) -> Tensor:
        return self.f.start(*args)

    def column(self: Any, *args: Any) -> Callable[..., Any]:
        column = self.probe.evaluation(self.f.column, lambda *_: 0)(*args)
        return self.probe.evaluation(column, Tensor.numel)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of a module or an object, changed for a while."""
    old = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


def peak_mib(step: Callable[[], object], cuda: bool) -> float:
    """MiB allocated at the peak of a step, over what there was before it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    level = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / 2**20


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
