"""What generation keeps of the positions behind, which are settled, for any layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Settled(Protocol):
    """What f needs of positions at equilibrium, a row for each text that is being generated.

    It is changed in place: nobody else may hold on to what it gives out.
    """

    @property
    def length(self) -> int:
        """Number of settled positions, S."""

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f over the positions that follow, of these injections (B, T, D).

        Args:
            injection: u of these positions.
            padding: (B, S + T) bool, True at positions that must not be attended to; None: there are none.
        """

    def append(self, state: Tensor, injection: Tensor) -> None:
        """Settle the positions that follow, at states (B, T, C) with injections (B, T, D)."""

    def reorder(self, order: Tensor) -> None:
        """Row i becomes what row `order[i]` was."""


class SettledPast:
    """`Settled` for any layer: a new past for every position.

    Args:
        prepared: the layer with the weights of this text.
    """

    def __init__(self, prepared: Any) -> None:
        self.prepared, self.past, self.length = prepared, None, 0

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        return self.prepared.bind(injection, self.past, padding)

    def append(self, state: Tensor, injection: Tensor) -> None:
        self.past = self.prepared.settled(state, injection, self.past)
        self.length += state.shape[1]

    def reorder(self, order: Tensor) -> None:
        if self.past is not None:
            self.past = self.past.rows(order)
