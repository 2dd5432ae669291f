"""What a segment leaves behind for the next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Equilibria and injections of the last positions, a row for each stream of text.

    Attributes:
        state: what `recorded` says of the positions, (B, M, R), detached: their equilibria, for most layers.
        injection: their injections, (B, M, D), detached.
    """

    state: Tensor
    injection: Tensor

    @property
    def length(self) -> int:
        """Number of remembered positions, M."""
        return self.state.shape[1]

    def extended(self, state: Tensor, injection: Tensor, keep: int) -> Memory:
        """This memory followed by new positions, cut to the last `keep`.

        Args:
            state: what `recorded` says of new positions, (B, T, R).
            injection: their injections, (B, T, D).
            keep: positions to keep; everything before them is forgotten.
        Returns:
            the new memory; gradients pass to `state` and `injection`.
        """
        states = torch.cat([self.state, state], 1)
        injections = torch.cat([self.injection, injection], 1)
        first = max(0, states.shape[1] - keep)
        return Memory(states[:, first:], injections[:, first:])

    def detached(self) -> Memory:
        """The same values, cut off from the graph."""
        return Memory(self.state.detach(), self.injection.detach())

    def to(self, device: torch.device) -> Memory:
        """The same values on `device`."""
        return Memory(self.state.to(device), self.injection.to(device))


class MemoryCarrier:
    """Hands the memory that one batch of streams leaves to the batch that continues them.

    Every batch has a carrier of its own, linked to that of the batch before. So batches may be fetched long
    before they are run, and a batch that is run twice (as fairseq does after an overflow) starts twice from
    the same memory. A batch that was never run leaves nothing. Each model of an ensemble finds what it left
    itself.

    Args:
        previous: the carrier of the batch before; None at the start of a pass.
        after: what the model leaves, for a carrier that stands for batches run earlier.
    Attributes:
        after: what the model left, of an ensemble the one that ran last.
    """

    def __init__(self, previous: MemoryCarrier | None = None, after: Memory | None = None) -> None:
        self._previous = previous
        self._before: dict[int | None, Memory | None] = {}  # by the id of the model; None: of any
        self._left: dict[int | None, Memory | None] = {}
        self.after = after

    def before(self, device: torch.device, model: object = None) -> Memory | None:
        """What the batch before left, on `device`.

        Args:
            device: where the memory goes.
            model: the one of an ensemble that asks; it gets what it left itself.
        """
        if self._previous is not None:
            self._before = {None: self._previous.after, **self._previous._left}
            self._previous = None  # or every batch of a pass would be kept
        memory = self._before.get(id(model), self._before.get(None))
        return None if memory is None else memory.to(device)

    def leave(self, memory: Memory | None, model: object) -> None:
        """Keep what a model leaves for its next batch."""
        self._left[id(model)] = self.after = memory
