"""The data of a DEQ-TrellisNet layer: the weights of one forward pass, the context, and one segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...invariant_matmul import rowwise_linear
from ..dropout import apply_mask


@dataclass(frozen=True)
class TrellisMasks:
    """The dropout masks of one forward pass; None where nothing is dropped."""

    hidden: Tensor | None = None  # of h, (B, 1, H)
    weight: Tensor | None = None  # of the taps k-1 ... 1, (4H, (k-1)H)


@dataclass(frozen=True)
class TrellisWeights:
    """The weights of one forward pass, weight dropout and norm applied; the oldest position's tap first."""

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
        """Number of earlier positions that the convolution reads, k-1."""
        return self.kernel_size - 1


@dataclass(frozen=True)
class TrellisContext:
    """The last states before a segment, those that its positions read; its size does not grow with the text.

    Attributes:
        hidden: h of the last k-1 positions, (B, k-1, H).
        cell: c of the last position, (B, 1, H).
    """

    hidden: Tensor
    cell: Tensor

    @classmethod
    def beginning(cls, weights: TrellisWeights, like: Tensor) -> TrellisContext:
        """The context at the beginning of a text: zeros, with the batch and dtype of `like` (B, ...)."""
        batch, width = like.shape[0], weights.hidden_dim
        return cls(like.new_zeros(batch, weights.reach, width), like.new_zeros(batch, 1, width))

    def followed_by(self, state: Tensor) -> TrellisContext:
        """The context after S further positions with states (B, S, C); S may be 0."""
        reach = self.hidden.shape[1]
        hidden, cell = state.split(self.hidden.shape[-1], -1)
        hidden = torch.cat([self.hidden, hidden[:, -reach:]], 1)[:, -reach:]
        # Cloned, as a view would keep the whole segment in memory; joined, as S may be 0.
        return TrellisContext(hidden, torch.cat([self.cell, cell[:, -1:]], 1)[:, -1:].clone())

    def rows(self, index: Tensor) -> TrellisContext:
        """The samples with these indices, (B',), in that order."""
        return TrellisContext(self.hidden.index_select(0, index), self.cell.index_select(0, index))


@dataclass(frozen=True)
class TrellisSegment:
    """Everything that f reads besides z, for T positions of B samples."""

    weights: TrellisWeights
    context: TrellisContext
    injection: Tensor  # u + b, (B, T, 4H)
    before: Tensor  # d * h of the last positions before the segment, (B, k-1, H)
    keep: Tensor | None  # factor of f, (B, T), 0 at padding; None: 1 everywhere

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
        """Channels of h, and likewise of c, H."""
        return self.weights.hidden_dim

    @property
    def batch(self) -> int:
        """Number of samples, B."""
        return self.injection.shape[0]

    @property
    def length(self) -> int:
        """Number of positions, T."""
        return self.injection.shape[1]

    def windows(self, z: Tensor) -> Tensor:
        """The input of the convolution at each position, d * h of the last k positions, (B, T, kH)."""
        hidden = apply_mask(z[..., : self.width], self.weights.masks.hidden)
        seen = torch.cat([self.before, hidden], 1)
        return torch.cat([seen[:, j : j + self.length] for j in range(self.weights.kernel_size)], -1)

    def cells_before(self, z: Tensor) -> Tensor:
        """c_{t-1} for each position, (B, T, H)."""
        return torch.cat([self.context.cell, z[:, :-1, self.width :]], 1)

    def gates(self, z: Tensor) -> Tensor:
        """The gates before sigma and tanh, (B, T, 4H)."""
        rows = self.windows(z).reshape(self.batch * self.length, -1)
        return rowwise_linear(rows, self.weights.taps).view_as(self.injection) + self.injection


def gated(gates: Tensor, before: Tensor) -> Tensor:
    """(h', c'), (..., 2H), from c_{t-1} and the gates before sigma and tanh, (..., 4H)."""
    i, o, g, f = gates.chunk(4, -1)
    cell = f.sigmoid() * before + i.sigmoid() * g.tanh()
    return torch.cat([o.sigmoid() * cell.tanh(), cell], -1)
