"""What generation keeps of the positions behind, which are settled, for any layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor


class LayerCache(Protocol):
    """What f needs of settled positions, with a row for each text that is being generated.

    It is changed in place: `append` and `reorder` make maps that `bind` has given out invalid.
    """

    @property
    def length(self) -> int:
        """Number of settled positions, S."""

    @property
    def nbytes(self) -> int:
        """Bytes of the settled positions; room that is kept free does not count."""

    def bind(self, injection: Tensor, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f over the positions that follow.

        Args:
            injection: u of these positions, (B, T, D).
            padding: (B, S + T) bool, True at positions that must not be seen; None: there are none.
        """

    def append(self, record: Tensor, injection: Tensor) -> None:
        """Settle the positions that follow.

        Args:
            record: what `recorded` says of them, (B, T, R).
            injection: their injections, (B, T, D).
        """

    def reorder(self, order: Tensor) -> None:
        """Row i becomes what row `order[i]` was."""


class Binds(Protocol):
    """The part of a prepared layer that a cache needs."""

    def context(self, record: Tensor, injection: Tensor, context: Any) -> Any:
        """The context after further settled positions."""

    def bind(self, injection: Tensor, context: Any, padding: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f over the positions after a context."""


class ContextCache:
    """`LayerCache` for any layer: its context, made anew for every position.

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
