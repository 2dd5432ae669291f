"""The solvers by name, and the interface that a solver implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .config import SolverConfig


class Stepper(Protocol):
    """The update rule of a solver: from z and f(z) to the next z, for every lane at once.

    The loop (`solve`) owns residuals, stopping, freezing and the best state; a stepper owns only the
    history its rule needs. Rows are lanes; a rule must never mix two rows.
    `default_memory` is the history length where the configuration names none.
    """

    default_memory: int

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        """Empty history for the lanes of `like`, shape (n, D)."""

    def step(self, z: Tensor, fz: Tensor, fresh: Tensor | None, tau: Tensor) -> Tensor:
        """The next state.

        Args:
            z: states, (n, D).
            fz: f(z), (n, D).
            fresh: (n, 1) bool; these lanes start again, their history must be forgotten; None: no lane does.
            tau: (n, 1) step length of each lane.
        Returns:
            next states, (n, D); z + tau*(f(z) - z) for a fresh lane.
        """

    def select(self, source: Tensor) -> None:
        """Keep the rows `source` (n',) of the history, in that order; -1 stands for a fresh lane."""


_SOLVERS: dict[str, type[Stepper]] = {}


def register_solver(name: str) -> Callable[[type], type]:
    """Class decorator that adds a `Stepper` under `name`; a name can be taken once.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: type) -> type:
        if name in _SOLVERS:
            raise ValueError(f"solver {name!r} is already registered as {_SOLVERS[name].__name__}")
        _SOLVERS[name] = cls
        return cls

    return add


def solver_names() -> tuple[str, ...]:
    """Names of the registered solvers, sorted."""
    return tuple(sorted(_SOLVERS))


def get_solver(name: str) -> type[Stepper]:
    """The stepper class registered as `name`."""
    return _SOLVERS[name]


def select_rows(history: Tensor, source: Tensor) -> Tensor:
    """Rows `source` of `history` along dimension 0, with zeros where `source` is -1."""
    kept = history.index_select(0, source.clamp(min=0))
    new = (source < 0).view(-1, *[1] * (history.dim() - 1))
    return kept.masked_fill_(new, 0)
