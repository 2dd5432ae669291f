"""The interface between a model and its layer f, with defaults for everything that is optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .cache import ContextCache, LayerCache
from .weight_norm import Initializer

Map = Callable[[Tensor], Tensor]


class PreparedLayer:
    """A layer with the weights and dropout masks of one forward pass.

    A segment is solved given its *context*: what f needs to know of the positions before the segment,
    which are *settled* (solved, and not changed any more). Each family of layers has its own type of
    context, with a method `rows(index)`; None stands for the beginning of a text.
    """

    def context(self, record: Tensor, injection: Tensor, context: Any) -> Any:
        """The context after S further settled positions.

        Args:
            record: what `recorded` returns for them, (B, S, R): their states, unless f has a method `record`.
            injection: u of these positions, (B, S, D).
            context: the context before them; None: there are no positions before.
        """
        raise NotImplementedError

    def bind(self, injection: Tensor, context: Any, padding: Tensor | None = None, start: int = 0) -> Map:
        """f(z) for one segment; everything that does not depend on z is computed here, once.

        Args:
            injection: u of the segment, (B, T, D).
            context: the context of the M positions before it; None: there are none.
            padding: (B, M + T) bool, True at positions that must not be seen; None: there are none.
            start: index of the segment's first position among those that the dropout masks were drawn for.
        Returns:
            the map (B, T, C) -> (B, T, C). It may have a `direction`, `restrict` (see `Restrictable`),
            `adjoint` (see `HasAdjoint`), `record` (see `recorded`) and `holds_its_tensors` (see
            `CapturedLoop`).
        """
        raise NotImplementedError

    def new_cache(self, batch: int) -> LayerCache:
        """The empty cache that generation starts with, for `batch` texts."""
        return ContextCache(self)


class Layer(nn.Module):
    """A layer f(z; u) over states (B, T, C) with injections (B, T, D), to be solved for z = f(z; u).

    Attributes:
        state_dim: channels of a state, C.
        injection_dim: channels of an injection, D.
        output_dim: channels of the features that the softmax reads.
        record_dim: channels of a position's record, R (see `recorded`).
        own_dim: number of leading channels of a state through which each position depends on itself.
        is_recurrent: whether its f is a `Recurrent`, which can be solved at one position after another.

    Args:
        state_dim, injection_dim: as above; the other sizes are C unless a subclass changes them.
    """

    is_recurrent = False

    def __init__(self, state_dim: int, injection_dim: int) -> None:
        super().__init__()
        self.state_dim = self.output_dim = self.record_dim = self.own_dim = state_dim
        self.injection_dim = injection_dim

    def initialize(self, initializer: Initializer) -> None:
        """Draw the matrices among the weights from `initializer`; vectors keep their values."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                initializer.fill(parameter)

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax reads, (B, T, output_dim), from states (B, T, C); here the states."""
        return state

    def memory_length(self, mem_len: int) -> int:
        """How many positions of a segment are kept for the next one.

        Args:
            mem_len: the number that the user asks for.
        """
        return mem_len

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> Any:
        """Draw the dropout masks of one forward pass; every solve of the pass uses the same ones. By default:
        none.

        Args:
            batch, length, memory: numbers of samples, positions and remembered positions, B, T and M.
            like: a tensor of the device and dtype to use.
        """

    def prepare(self, masks: Any) -> PreparedLayer:
        """The layer with the weights of one forward pass and these masks."""
        raise NotImplementedError


def recorded(f: Map, z: Tensor) -> Tensor:
    """The record of positions that are settled at z (B, T, C): what later positions need of them, (B, T, R).

    It is the state z, or `f.record(z)` if f has such a method.
    """
    # By name, as `isinstance` of a protocol would take as long as several operations on one token.
    record: Callable[[Tensor], Tensor] | None = getattr(f, "record", None)
    return z if record is None else record(z)
