"""The cache of generation, for any layer: what f needs of the *settled* positions.

A position is settled when it has been solved and its state will not change any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor


class LayerCache(Protocol):
    """What f needs of the settled positions of B texts that are being generated.

    `append` and `reorder` change the cache in place. Do not use a map from `bind` after either of them.
    """

    @property
    def length(self) -> int:
        """Number of settled positions, S."""

    @property
    def nbytes(self) -> int:
        """Memory of the settled positions, in bytes; free space in buffers does not count."""

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f over the next T positions.

        Args:
            injection: u of these positions, (B, T, D).
            padding: (B, S + T) bool, True at positions that must not be seen; None: there are none.
        """

    def append(self, record: Tensor, injection: Tensor) -> None:
        """Add the next T positions, now that they are settled.

        Args:
            record: what `recorded` returns for them, (B, T, R).
            injection: u of these positions, (B, T, D).
        """

    def reorder(self, order: Tensor) -> None:
        """Make text i a copy of text `order[i]`, for all i at once; order is (B',)."""


class Binds(Protocol):
    """The part of a prepared layer that a cache needs."""

    def context(self, record: Tensor, injection: Tensor, context: Any) -> Any:
        """The context after further settled positions."""

    def bind(self, injection: Tensor, context: Any, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f over the positions after a context."""


class ContextCache:
    """`LayerCache` for any layer: its context, which each `append` makes anew.

    Args:
        prepared: the layer with the weights of this text.
    """

    def __init__(self, prepared: Binds) -> None:
        self.prepared, self.length = prepared, 0
        self.context: Any = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self.context))

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        return self.prepared.bind(injection, self.context, padding)

    def append(self, record: Tensor, injection: Tensor) -> None:
        self.context = self.prepared.context(record, injection, self.context)
        self.length += record.shape[1]

    def reorder(self, order: Tensor) -> None:
        if self.context is not None:
            self.context = self.context.rows(order)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a context holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
