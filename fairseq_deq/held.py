"""Any map at some positions, with all others held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .solvers import Restrictable


def restrictable(f: Callable[[Tensor], Tensor]) -> Restrictable:
    """f itself where it can be evaluated at some positions only; else `HeldElsewhere`."""
    return f if isinstance(f, Restrictable) else HeldElsewhere(f)


@dataclass(frozen=True)
class HeldElsewhere:
    """A map that can be evaluated at all positions only, as one that can be asked for some of them.

    It saves no work: every evaluation at some positions is one at all.

    Attributes:
        f: the map.
    """

    f: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        return self.f(z)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None) -> Callable[[Tensor], Tensor]:
        """f at the flat `positions`, with all other positions held at z."""
        held = z.reshape(-1, z.shape[-1])

        def block(own: Tensor) -> Tensor:
            whole = held.index_copy(0, positions, own).view_as(z)
            return self.f(whole).reshape_as(held).index_select(0, positions)

        return block
