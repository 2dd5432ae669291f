"""The memory: what one segment of a text leaves for the next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Records and injections of the last positions, a row per stream of text.

    Attributes:
        state: what `recorded` returns for the positions, (B, M, R), detached; for most layers their
            equilibria.
        injection: u of the positions, (B, M, D), detached.
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
            state: what `recorded` returns for the new positions, (B, T, R).
            injection: u of the new positions, (B, T, D).
            keep: number of positions to keep.
        Returns:
            the new memory; gradients pass to `state` and `injection`.
        """
        states = torch.cat([self.state, state], 1)
        injections = torch.cat([self.injection, injection], 1)
        first = max(0, states.shape[1] - keep)
        return Memory(states[:, first:], injections[:, first:])

    def detached(self) -> Memory:
        """The same values without their graph."""
        return Memory(self.state.detach(), self.injection.detach())

    def to(self, device: torch.device) -> Memory:
        """The same values on `device`."""
        return Memory(self.state.to(device), self.injection.to(device))


class MemoryCarrier:
    """Hands the memory that one batch of streams leaves to the batch that continues them.

    Every batch has its own carrier, which is linked to that of the batch before. So batches may be fetched
    long before they are run. A batch that is run twice, as fairseq does after an overflow, starts from the
    same memory both times, and a batch that was never run leaves none. Each model of an ensemble gets the
    memory that it left.

    Args:
        previous: the carrier of the batch before; None at the start of a pass.
        after: the memory to hand on, if the carrier stands for batches that were run earlier.
    Attributes:
        after: the memory that the model left; in an ensemble, the model that ran last.
    """

    def __init__(self, previous: MemoryCarrier | None = None, after: Memory | None = None) -> None:
        self._previous = previous
        self._before: dict[int | None, Memory | None] = {}  # by id of the model; None: any model
        self._left: dict[int | None, Memory | None] = {}
        self.after = after

    def before(self, device: torch.device, model: object = None) -> Memory | None:
        """The memory that the batch before left, on `device`; None if it left none.

        Args:
            device: where the memory is to be.
            model: the model of an ensemble that asks; it gets what it left itself.
        """
        if self._previous is not None:
            self._before = {None: self._previous.after, **self._previous._left}
            self._previous = None  # otherwise the carriers of a whole pass would stay in memory
        memory = self._before.get(id(model), self._before.get(None))
        return None if memory is None else memory.to(device)

    def leave(self, memory: Memory | None, model: object) -> None:
        """Keep the memory that `model` leaves for its next batch."""
        self._left[id(model)] = self.after = memory
