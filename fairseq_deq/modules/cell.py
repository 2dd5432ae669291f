"""What a model asks of its layer f."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .weight_norm import Initializer


class Past(Protocol):
    """What the layer needs of the positions before a segment, whose state is settled."""

    def rows(self, index: Tensor) -> Any:
        """The samples `index` (B',), in that order."""


class Prepared(Protocol):
    """A layer with the weights and masks of one forward pass."""

    def settled(self, state: Tensor, injection: Tensor, past: Any) -> Any:
        """The `Past` after settled positions (B, S, C), of these injections, that follow `past`."""

    def bind(
        self, injection: Tensor, past: Any, padding: Tensor | None = None, start: int = 0
    ) -> Callable[[Tensor], Tensor]:
        """f(z) for one segment of these injections (B, T, D), with all that does not depend on z computed."""


class Cell(Protocol):
    """A layer f(z; u) over states (B, T, C) with injections (B, T, D)."""

    @property
    def state_dim(self) -> int:
        """Channels of the state, C."""

    @property
    def own_dim(self) -> int:
        """Leading channels of the state through which a position depends on itself."""

    @property
    def injection_dim(self) -> int:
        """Channels of the injection, D."""

    @property
    def output_dim(self) -> int:
        """Channels of `output`."""

    def initialize(self, initializer: Initializer) -> None:
        """Draw the initial weights."""

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax sees, from states (B, T, C)."""

    def remembered(self, mem_len: int) -> int:
        """Positions of a segment to keep for the next one, where `mem_len` are asked for."""

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> Any:
        """Draw the dropout masks of one forward pass."""

    def prepare(self, masks: Any) -> Prepared:
        """The layer with the weights of one forward pass and these masks."""
