"""What a segment leaves behind for the next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Equilibria and injections of the last positions, a row for each stream of text.

    Attributes:
        state: equilibria, (B, M, C), detached.
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
            state: new equilibria, (B, T, C).
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
