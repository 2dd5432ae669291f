"""The weights of one forward pass of a DEQ-TrellisNet layer, and everything of one segment that it reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...invariant_matmul import rowwise_linear
from ..dropout import apply_mask


@dataclass(frozen=True)
class TrellisMasks:
    """Masks of one forward pass; None where nothing is dropped."""

    hidden: Tensor | None = None  # (B, 1, H)
    weight: Tensor | None = None  # (4H, (k-1)H)


@dataclass(frozen=True)
class TrellisWeights:
    """The taps, dropped and normalised once, the oldest first."""

    hidden_dim: int  # H
    kernel_size: int  # k
    taps: Tensor  # (4H, kH)
    bias: Tensor  # (4H,)
    masks: TrellisMasks

    @property
    def past_taps(self) -> Tensor:
        """Taps k-1 .. 1, (4H, (k-1)H)."""
        return self.taps[:, : self.reach * self.hidden_dim]

    @property
    def own_tap(self) -> Tensor:
        """Tap 0, (4H, H)."""
        return self.taps[:, self.reach * self.hidden_dim :]

    @property
    def reach(self) -> int:
        """Positions that one looks back at, k-1."""
        return self.kernel_size - 1


@dataclass(frozen=True)
class TrellisContext:
    """The states before a segment, as far back as a position looks; constant in the length of the text.

    Attributes:
        hidden: h of the last k-1 positions, (B, k-1, H).
        cell: c of the last position, (B, 1, H).
    """

    hidden: Tensor
    cell: Tensor

    @classmethod
    def beginning(cls, weights: TrellisWeights, like: Tensor) -> TrellisContext:
        """That of the beginning of a text: zeros, for the rows of `like` (B, ...)."""
        batch, width = like.shape[0], weights.hidden_dim
        return cls(like.new_zeros(batch, weights.reach, width), like.new_zeros(batch, 1, width))

    def followed_by(self, state: Tensor) -> TrellisContext:
        """The context after further positions, at states (B, S, C)."""
        reach = self.hidden.shape[1]
        hidden, cell = state.split(self.hidden.shape[-1], -1)
        hidden = torch.cat([self.hidden, hidden[:, -reach:]], 1)[:, -reach:]
        # A view would keep the whole segment in memory; there may be no position at all.
        return TrellisContext(hidden, torch.cat([self.cell, cell[:, -1:]], 1)[:, -1:].clone())

    def rows(self, index: Tensor) -> TrellisContext:
        """The samples `index` (B',), in that order."""
        return TrellisContext(self.hidden.index_select(0, index), self.cell.index_select(0, index))


@dataclass(frozen=True)
class TrellisSegment:
    """Weights, context, injections and padding of T positions of B samples."""

    weights: TrellisWeights
    context: TrellisContext
    injection: Tensor  # u + b, (B, T, 4H)
    before: Tensor  # what the convolution sees of h before the segment, (B, k-1, H)
    keep: Tensor | None  # (B, T), 0 at padding; None: 1 everywhere

    @classmethod
    def of(
        cls,
        weights: TrellisWeights,
        injection: Tensor,
        context: TrellisContext | None,
        padding: Tensor | None,
    ) -> TrellisSegment:
        """The segment of injections (B, T, 4H); arguments as for `PreparedLayer.bind`."""
        context = context or TrellisContext.beginning(weights, injection)
        keep = None if padding is None else (~padding[:, -injection.shape[1] :]).to(injection.dtype)
        before = apply_mask(context.hidden, weights.masks.hidden)
        return cls(weights, context, injection + weights.bias, before, keep)

    @property
    def width(self) -> int:
        """Channels of h, and of c, H."""
        return self.weights.hidden_dim

    @property
    def batch(self) -> int:
        """Samples, B."""
        return self.injection.shape[0]

    @property
    def length(self) -> int:
        """Positions, T."""
        return self.injection.shape[1]

    def windows(self, z: Tensor) -> Tensor:
        """What the convolution sees of h at each position, (B, T, kH), oldest first."""
        hidden = apply_mask(z[..., : self.width], self.weights.masks.hidden)
        seen = torch.cat([self.before, hidden], 1)
        return torch.cat([seen[:, j : j + self.length] for j in range(self.weights.kernel_size)], -1)

    def cells_before(self, z: Tensor) -> Tensor:
        """c_{t-1} for each position, (B, T, H)."""
        return torch.cat([self.context.cell, z[:, :-1, self.width :]], 1)

    def gates(self, z: Tensor) -> Tensor:
        """The gates before their nonlinearities, (B, T, 4H)."""
        rows = self.windows(z).reshape(self.batch * self.length, -1)
        return rowwise_linear(rows, self.weights.taps).view_as(self.injection) + self.injection


def gated(gates: Tensor, before: Tensor) -> Tensor:
    """(h', c') side by side, (..., 2H), from the gates (..., 4H) before their nonlinearities and c_{t-1}."""
    i, o, g, f = gates.chunk(4, -1)
    cell = f.sigmoid() * before + i.sigmoid() * g.tanh()
    return torch.cat([o.sigmoid() * cell.tanh(), cell], -1)
