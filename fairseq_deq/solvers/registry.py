"""The solvers by name, and the interface that a solver implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from .config import SolverConfig
    from .result import FixedPoint

Named = TypeVar("Named")


class Stepper(Protocol):
    """The update rule of a solver: from z and f(z) to the next z, for every lane at once.

    The loop (`solve`) owns residuals, stopping, freezing and the best state; a stepper owns only the
    history its rule needs. Rows are lanes; a rule must never mix two rows.
    `default_memory` is the history length where the configuration names none.
    """

    default_memory: int

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        """Empty history for the lanes of `like`, shape (n, D)."""

    def step(self, z: Tensor, fz: Tensor, g: Tensor, fresh: Tensor | None, tau: Tensor | None) -> Tensor:
        """The next state.

        Args:
            z: states, (n, D).
            fz: f(z), (n, D).
            g: f(z) - z, (n, D), which the stepper may keep.
            fresh: (n, 1) bool; these lanes start again, their history must be forgotten; None: no lane does.
            tau: (n, 1) step length of each lane; None: 1 for every lane.
        Returns:
            next states, (n, D), in a new tensor; z + tau*g for a fresh lane.
        """

    def skip(self) -> None:
        """An iteration passes in which no lane moves; whichever lane moves next will be fresh."""

    def subset(self, source: Tensor) -> Stepper:
        """A stepper with the rows `source` (n',) of the history, in that order; -1: an empty one."""

    def inverse_transpose(self, vector: Tensor) -> Tensor:
        """The history's estimate of (I - J)^{-T} `vector`, (n, D), with J = df/dz of each lane by itself."""


LinearSolver = Callable[[Callable[[Tensor], Tensor], Tensor, "SolverConfig"], "FixedPoint"]

_STEPPERS: dict[str, type[Stepper]] = {}
_LINEAR: dict[str, LinearSolver] = {}


def register_solver(name: str) -> Callable[[type], type]:
    """Class decorator that adds a `Stepper` under `name`; a name can be taken once.

    Raises:
        ValueError: the name is taken.
    """
    return _adder(name, _STEPPERS)


def register_linear_solver(name: str) -> Callable[[LinearSolver], LinearSolver]:
    """Decorator that adds a function (f, z0, config) -> FixedPoint, for affine f, under `name`.

    Raises:
        ValueError: the name is taken.
    """
    return _adder(name, _LINEAR)


def _adder(name: str, table: dict[str, Any]) -> Callable[[Named], Named]:
    def add(entry: Named) -> Named:
        taken = _STEPPERS.get(name) or _LINEAR.get(name)
        if taken is not None:
            raise ValueError(f"solver {name!r} is already registered as {taken.__name__}")
        table[name] = entry
        return entry

    return add


def solver_names() -> tuple[str, ...]:
    """Names of the solvers for any f, sorted."""
    return tuple(sorted(_STEPPERS))


def linear_solver_names() -> tuple[str, ...]:
    """Names of the solvers for affine f only, sorted."""
    return tuple(sorted(_LINEAR))


def get_solver(name: str) -> type[Stepper]:
    """The stepper class registered as `name`."""
    return _STEPPERS[name]


def get_linear_solver(name: str) -> LinearSolver | None:
    """The function registered as `name`; None where `name` is a stepper."""
    return _LINEAR.get(name)


def select_rows(history: Tensor, source: Tensor) -> Tensor:
    """Rows `source` of `history` along dimension 0, with zeros where `source` is -1."""
    kept = history.index_select(0, source.clamp(min=0))
    new = (source < 0).view(-1, *[1] * (history.dim() - 1))
    return kept.masked_fill_(new, 0)
