"""A layer that is defined per position: by a map from a few states and one injection to a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..invariant_matmul import pad_rows
from .dropout import apply_mask, variational_mask
from .layer import Layer, PreparedLayer


class WindowLayer(Layer):
    """f(z; u)_t = forward([z_{t-k+1}, ..., z_t], u_t), where positions before the text, or padded, are zero.

    A subclass passes its sizes to `__init__` and defines `forward`. The rest of what a model needs is made
    from it: padding, the context of a segment, the cache of generation, evaluation at some positions only,
    and gradients through autograd.

    `forward` gets many positions at once, one per row. The number of rows is a multiple of 16, so that an
    ordinary `nn.Linear` rounds a row the same, whatever the other rows are. A row must not depend on another
    row, nor on anything that changes from one evaluation to the next: `forward` must contain no `nn.Dropout`
    and no batch norm.

    Args:
        state_dim: channels of a state, C.
        injection_dim: channels of an injection, D.
        window: number of positions that each position sees, itself included, k.
        dropout: probability of dropping a channel of z inside f, at all positions of a sample.
    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, state_dim: int, injection_dim: int, window: int = 1, dropout: float = 0.0) -> None:
        for name, size in (("state_dim", state_dim), ("injection_dim", injection_dim), ("window", window)):
            if size < 1:
                raise ValueError(f"{name} of a layer must be at least 1, got {size}")
        super().__init__(state_dim, injection_dim)
        self.window, self.state_dropout = window, dropout

    def forward(self, states: Tensor, injection: Tensor) -> Tensor:
        """f at n positions.

        Args:
            states: of each position and the k-1 before it, the oldest first, (n, k, C).
            injection: u of each position, (n, D).
        Returns:
            (n, C).
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method forward(states, injection)")

    def memory_length(self, mem_len: int) -> int:
        """Number of positions to keep: k-1, which the next segment reads; 0 if `mem_len` is 0."""
        return self.window - 1 if mem_len else 0

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> Tensor | None:
        """The dropout mask of one forward pass, (B, 1, C); arguments as for `Layer.draw`."""
        return variational_mask(like, (batch, 1, self.state_dim), self.state_dropout, self.training)

    def prepare(self, masks: Tensor | None) -> PreparedWindow:
        """The layer with this mask."""
        return PreparedWindow(self, masks)


@dataclass(frozen=True)
class WindowContext:
    """The states of the last positions before a segment, those that it reads: (B, k-1, C)."""

    states: Tensor

    def rows(self, index: Tensor) -> WindowContext:
        """The samples with these indices, (B',), in that order."""
        return WindowContext(self.states.index_select(0, index))


class PreparedWindow(PreparedLayer):
    """A window layer with the dropout mask of one forward pass.

    Args:
        layer: the layer.
        mask: the mask, (B, 1, C), or None.
    """

    def __init__(self, layer: WindowLayer, mask: Tensor | None) -> None:
        self.layer, self.mask = layer, mask

    def context(self, record: Tensor, injection: Tensor, context: WindowContext | None) -> WindowContext:
        reach = self.layer.window - 1
        before = _beginning(self.layer, record) if context is None else context.states
        states = torch.cat([before, record], 1)
        # A view would keep the whole segment in memory.
        return WindowContext(states[:, states.shape[1] - reach :].clone())

    def bind(
        self, injection: Tensor, context: WindowContext | None, padding: Tensor | None = None, start: int = 0
    ) -> BoundWindow:
        before = _beginning(self.layer, injection) if context is None else context.states
        keep = None if padding is None else (~padding[:, -injection.shape[1] :]).to(injection.dtype)
        return BoundWindow(
            WindowSegment(self.layer, self.mask, apply_mask(before, self.mask), injection, keep)
        )


def _beginning(layer: WindowLayer, like: Tensor) -> Tensor:
    """The states before a text: zeros, (B, k-1, C)."""
    return like.new_zeros(like.shape[0], layer.window - 1, layer.state_dim)


@dataclass(frozen=True)
class WindowSegment:
    """Everything of one segment that does not depend on z."""

    layer: WindowLayer
    mask: Tensor | None  # (B, 1, C)
    before: Tensor  # states before the segment, times the mask, (B, k-1, C)
    injection: Tensor  # (B, T, D)
    keep: Tensor | None  # factor of f, (B, T), 0 at padding; None: 1 everywhere

    def windows(self, z: Tensor) -> Tensor:
        """The states that each position reads, at z (B, T, C): (B*T, k, C)."""
        seen = torch.cat([self.before, apply_mask(z, self.mask)], 1)
        parts = [seen[:, j : j + z.shape[1]] for j in range(self.layer.window)]
        return torch.stack(parts, 2).flatten(0, 1)

    def evaluate(self, windows: Tensor, injection: Tensor, keep: Tensor | None) -> Tensor:
        """f at n positions, (n, C): `forward` over rows in multiples of 16, and zero at padding."""
        n, (window, width) = windows.shape[0], windows.shape[1:]
        states = pad_rows(windows.reshape(n, -1)).view(-1, window, width)
        fz: Tensor = self.layer(states, pad_rows(injection))
        if fz.shape != (states.shape[0], width):
            raise ValueError(
                f"forward of {type(self.layer).__name__} gave {tuple(fz.shape)} for states "
                f"{tuple(states.shape)}; it must give a state of the same shape for each row, "
                f"{(states.shape[0], width)}"
            )
        fz = fz[:n]
        return fz if keep is None else fz * keep.unsqueeze(1)


class BoundWindow:
    """z -> f(z) over (B, T, C), for one segment.

    Args:
        segment: everything that does not depend on z.
    """

    direction = 1  # each position depends on itself and on earlier ones

    def __init__(self, segment: WindowSegment) -> None:
        self.segment = segment
        self._injection = segment.injection.flatten(0, 1)  # (B*T, D)
        self._keep = None if segment.keep is None else segment.keep.flatten()

    def __call__(self, z: Tensor) -> Tensor:
        segment = self.segment
        return segment.evaluate(segment.windows(z), self._injection, self._keep).view_as(z)

    def restrict(
        self, z: Tensor, positions: Tensor, value: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """f at some positions, (n, C) -> (n, C), with all others held at z.

        Args:
            z: the state, (B, T, C).
            positions: sorted indices b*T + t, (n,).
            value: unused.
        """
        return _RestrictedWindow(self.segment, self._injection, self._keep, z, positions)


class _RestrictedWindow:
    """f at some positions, (n, C) -> (n, C); all other positions keep their states at z."""

    def __init__(
        self, segment: WindowSegment, injection: Tensor, keep: Tensor | None, z: Tensor, positions: Tensor
    ) -> None:
        n, length, window = positions.numel(), z.shape[1], segment.layer.window
        sample, time = positions // length, positions % length
        self.segment = segment
        self.mask = None if segment.mask is None else segment.mask[:, 0].index_select(0, sample)
        self.injection = injection.index_select(0, positions)
        self.keep = None if keep is None else keep.index_select(0, positions)
        self.held = segment.windows(z).index_select(0, positions)  # (n, k, C)
        # For each of the n positions and each place in its window, the row to read there; n if it is held.
        place = positions.new_full((z.shape[0] * length,), n)
        place[positions] = torch.arange(n, device=z.device)
        back = torch.arange(window - 1, -1, -1, device=z.device)
        seen = (positions.unsqueeze(1) - back).clamp(min=0)  # (n, k)
        moving = place[seen].masked_fill(time.unsqueeze(1) < back, n)
        self.source = moving.clamp(max=n - 1)
        self.is_held = (moving == n).unsqueeze(-1)  # (n, k, 1)

    def __call__(self, rows: Tensor) -> Tensor:
        windows = torch.where(self.is_held, self.held, apply_mask(rows, self.mask)[self.source])
        return self.segment.evaluate(windows, self.injection, self.keep)
