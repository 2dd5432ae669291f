"""The DEQ-TrellisNet layer at all positions of a segment, and at one position after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...invariant_matmul import rowwise_linear
from ..dropout import apply_mask
from .adjoint import TrellisAdjoint
from .restricted import RestrictedTrellis
from .segment import TrellisSegment, gated


class BoundTrellis:
    """z -> f(z) over (B, T, C), for one segment; it is also a `Recurrent`.

    The equations are in the docstring of `TrellisLayer`.

    Args:
        segment: everything that does not depend on z.
    """

    direction = 1  # each position depends on itself and on earlier ones

    def __init__(self, segment: TrellisSegment) -> None:
        self.segment = segment

    def __call__(self, z: Tensor) -> Tensor:
        segment = self.segment
        fz = gated(segment.gates(z), segment.cells_before(z))
        return fz if segment.keep is None else fz * segment.keep.unsqueeze(-1)

    def restrict(
        self, z: Tensor, positions: Tensor, value: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """f at some positions, (n, C) -> (n, C), with all others held at z.

        Args:
            z: the state, (B, T, C).
            positions: sorted indices b*T + t, (n,).
            value: unused.
        """
        return RestrictedTrellis(self.segment, z, positions)

    def adjoint(self, z: Tensor, grad: Tensor) -> TrellisAdjoint:
        """lambda -> J^T lambda + grad with J = df/dz at z; z and grad are (B, T, C)."""
        return TrellisAdjoint(self.segment, z, grad)

    # ------------------------------------------------------------------ position after position

    @property
    def own(self) -> int:
        """The number of leading channels through which each position depends on itself: those of h."""
        return self.segment.width

    @property
    def order(self) -> range:
        """The positions in the order in which they are solved: each after all that it depends on."""
        return range(self.segment.length)

    def start(self, z: Tensor, t: int) -> Tensor:
        """Where the solve for h_t starts, (B, H): the h of the position before t."""
        return z[:, t - 1, : self.own] if t else self.segment.context.hidden[:, -1]

    def column(self, z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        """f at position t as a function of its own h, with all earlier positions held at z.

        Args:
            z: states, (B, T, C); positions before t are settled.
            t: the position.
        Returns:
            (B, H) -> (B, C).
        """
        segment, weights, width = self.segment, self.segment.weights, self.own
        mask = weights.masks.hidden
        own_mask = None if mask is None else mask[:, 0]
        first = t - weights.reach
        hidden = apply_mask(z[:, max(first, 0) : t, :width], mask)
        if first < 0:
            hidden = torch.cat([segment.before[:, first:], hidden], 1)
        held = rowwise_linear(hidden.flatten(1), weights.past_taps) + segment.injection[:, t]  # (B, 4H)
        cell = z[:, t - 1, width:] if t else segment.context.cell[:, 0]
        keep, own_tap = segment.keep, weights.own_tap
        keep = None if keep is None else keep[:, t : t + 1]

        def f(h: Tensor) -> Tensor:
            fz = gated(rowwise_linear(apply_mask(h, own_mask), own_tap) + held, cell)
            return fz if keep is None else fz * keep

        return f
