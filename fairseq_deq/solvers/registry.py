"""The solvers by name, and the interface that a solver implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .record import Array
from .result import FixedPoint

Named = TypeVar("Named")
Precondition = Callable[[Tensor], Tensor]


class Method(Protocol):
    """The update rule of a solver: from z and g = f(z) - z to the next z, for every lane at once.

    The loop owns residuals, stopping, freezing and the best state; a method owns only the history its rule
    needs. Rows are lanes; a rule must never mix two rows. In each iteration the loop asks for the inner
    products that the method needs (`observe`), gets them all to where small systems are solved in one
    transfer, and hands them back (`step`).
    `default_memory` is the history length if the configuration gives none. `alike` (optional) says that from
    the third on all iterations are the same operations on tensors of the same shapes, all of which are
    attributes of the method, or entries of lists that are attributes.
    """

    default_memory: int

    def __init__(self, config: Any, like: Tensor, books: Array) -> None:
        """Empty history.

        Args:
            config: a `SolverConfig`, which looks up the names in this module.
            like: states of the lanes, (n, D).
            books: (n,), an array of the lanes' record: NumPy's or a tensor, as all such arrays are to be.
        """

    def observe(
        self, z: Tensor, g: Tensor, restarted: Array | None, precondition: Precondition
    ) -> list[Tensor]:
        """The inner products that the next step needs, (n,) each.

        Args:
            z: states, (n, D); not changed in place later.
            g: f(z) - z, (n, D), likewise.
            restarted: (n,) bool; the history of these lanes must be forgotten; None: no lane restarts.
            precondition: P of every row, (n, D) -> (n, D); the identity where there is none.
        """

    def step(
        self, products: Array, z: Tensor, g: Tensor, tau: Array | None, precondition: Precondition
    ) -> Tensor:
        """The next states, (n, D), in a new tensor; z + tau*P g for a lane without a history.

        Args:
            products: what `observe` asked for, (k, n), in float64.
            z, g, precondition: as for `observe`.
            tau: (n,) step length of each lane; None: 1 for every lane.
        """

    def skip(self) -> None:
        """Note an iteration in which no lane moves; a lane that moves later starts without a history."""

    def subset(self, source: Array) -> Method:
        """A method with the rows `source` (n',) of the history, in that order; -1: an empty one."""

    def inverse_transpose(self, vector: Tensor, precondition: Precondition) -> Tensor:
        """The history's estimate of (I - J)^{-T} `vector`, (n, D), with J = df/dz of each lane by itself.

        Args:
            vector: (n, D).
            precondition: P^T of every row.
        """


# From an affine map, a start (..., C) and a `SolverConfig`.
LinearSolver = Callable[[Callable[[Tensor], Tensor], Tensor, Any], FixedPoint]

# A `Method` class, or a function of the same arguments that chooses one.
Factory = Callable[[Any, Tensor, Array], Method]

_METHODS: dict[str, Factory] = {}
_LINEAR: dict[str, LinearSolver] = {}


def register_solver(name: str) -> Callable[[Named], Named]:
    """Decorator that adds a `Method` class under `name`, or a function that chooses one; each name once.

    Raises:
        ValueError: the name is taken.
    """
    return _adder(name, _METHODS)


def register_linear_solver(name: str) -> Callable[[LinearSolver], LinearSolver]:
    """Decorator that adds a function (f, z0, config) -> FixedPoint, for affine f, under `name`.

    Raises:
        ValueError: the name is taken.
    """
    return _adder(name, _LINEAR)


def _adder(name: str, table: dict[str, Any]) -> Callable[[Named], Named]:
    def add(entry: Named) -> Named:
        taken = _METHODS.get(name) or _LINEAR.get(name)
        if taken is not None:
            raise ValueError(f"solver {name!r} is already registered as {taken.__name__}")
        table[name] = entry
        return entry

    return add


def solver_names() -> tuple[str, ...]:
    """Names of the solvers for any f, sorted."""
    return tuple(sorted(_METHODS))


def linear_solver_names() -> tuple[str, ...]:
    """Names of the solvers for affine f only, sorted."""
    return tuple(sorted(_LINEAR))


def get_solver(name: str) -> Factory:
    """The class, or function, registered as `name`."""
    return _METHODS[name]


def get_linear_solver(name: str) -> LinearSolver | None:
    """The function registered as `name`; None where `name` is a `Method`."""
    return _LINEAR.get(name)
