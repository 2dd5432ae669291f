"""States of several tensors, as in multiscale models, as one state of a solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StatePacking:
    """Tensors with the samples in dimension 0, side by side in one state (samples, D).

    A solve of the packed state has one lane for each sample, whatever the axes of the tensors mean:

        packing = StatePacking.of((coarse, fine))
        packed = fixed_point(packing.map(f), packing.join((coarse, fine)))
        coarse, fine = packing.split(packed.state)

    Attributes:
        shapes: of the tensors, without the samples.
    """

    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, state: Sequence[Tensor]) -> StatePacking:
        """The packing of tensors shaped like these.

        Args:
            state: tensors (samples, ...) of one floating-point type.
        Raises:
            ValueError: there is none, or they differ in their samples or types.
        """
        if not state or not all(isinstance(part, Tensor) and part.dim() >= 1 for part in state):
            raise ValueError(f"a state must be tensors (samples, ...), got {type(state).__name__}")
        samples, types = {len(part) for part in state}, {part.dtype for part in state}
        if len(samples) > 1 or len(types) > 1:
            shapes = ", ".join(f"{tuple(part.shape)} of {part.dtype}" for part in state)
            raise ValueError(f"the tensors of a state must have the same samples and type, got {shapes}")
        return cls(tuple(part.shape[1:] for part in state))

    def join(self, state: Sequence[Tensor]) -> Tensor:
        """The tensors side by side, (samples, D).

        Raises:
            ValueError: they are not of the shapes of this packing.
        """
        shapes = tuple(part.shape[1:] for part in state)
        if shapes != self.shapes:
            raise ValueError(
                f"f must return tensors of the shapes {[tuple(s) for s in self.shapes]} per sample, got "
                f"{[tuple(s) for s in shapes]}"
            )
        return torch.cat([part.flatten(1) if part.dim() > 1 else part.unsqueeze(1) for part in state], 1)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a packed state (samples, D)."""
        parts = packed.split([shape.numel() for shape in self.shapes], 1)
        return tuple(part.view(len(packed), *shape) for part, shape in zip(parts, self.shapes))

    def map(self, f: Callable[..., Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
        """f as a map of packed states.

        Args:
            f: from as many tensors as a state has, to as many of the same shapes.
        """
        return lambda packed: self.join(f(*self.split(packed)))
