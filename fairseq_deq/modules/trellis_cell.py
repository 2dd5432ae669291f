"""The DEQ-TrellisNet layer: a causal convolution of the hidden state, and the gates of an LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dropout import apply_mask, variational_mask
from .rows import rowwise_linear
from .trellis_adjoint import TrellisAdjoint
from .weight_norm import Initializer, WeightNormLinear


@dataclass(frozen=True)
class TrellisPast:
    """The state before a segment, as far back as the convolution looks; constant in the length of the text.

    Attributes:
        hidden: h of the last k-1 positions, (B, k-1, H).
        cell: c of the last position, (B, 1, H).
    """

    hidden: Tensor
    cell: Tensor

    def rows(self, index: Tensor) -> TrellisPast:
        """The samples `index` (B',), in that order."""
        return TrellisPast(self.hidden.index_select(0, index), self.cell.index_select(0, index))


class TrellisCell(nn.Module):
    """One TrellisNet layer f(z; u), z = (h, c), to be solved for z = f(z; u).

    With k taps W_j, positions before the text at zero, and d a dropout mask,
        (i, o, g, f)_t = u_t + b + sum_{j<k} W_j (d * h_{t-j}),
        c'_t = sigma(f_t) * c_{t-1} + sigma(i_t) * tanh(g_t),   h'_t = sigma(o_t) * tanh(c'_t).
    A position so depends on its own h, on the last k-1 h and on the last c; on no later position.

    Args:
        hidden_dim: channels of h and of c, H; a state has C = 2*H.
        output_dim: the last channels of h are the output.
        kernel_size: taps, k >= 2.
        weight_norm: whether W, all taps together, is weight-normalised.
        dropout: probability of dropping a channel of h inside the convolution, at all positions.
        weight_dropout: probability of dropping a weight of the taps j >= 1.
    Source: Bai, Kolter, Koltun (2019, arXiv 1810.06682 and 1909.01377).
    """

    def __init__(
        self,
        hidden_dim: int,
        output_dim: int,
        kernel_size: int,
        weight_norm: bool,
        dropout: float,
        weight_dropout: float,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.output_dim, self.kernel_size = hidden_dim, output_dim, kernel_size
        self.dropout, self.weight_dropout = dropout, weight_dropout
        self.conv = WeightNormLinear(kernel_size * hidden_dim, 4 * hidden_dim, True, weight_norm)

    @property
    def state_dim(self) -> int:
        """Channels of the state z, C."""
        return 2 * self.hidden_dim

    @property
    def own_dim(self) -> int:
        """Leading channels through which a position depends on itself: those of h."""
        return self.hidden_dim

    @property
    def injection_dim(self) -> int:
        """Channels of the injection u."""
        return 4 * self.hidden_dim

    def initialize(self, initializer: Initializer) -> None:
        """Draw the weights from `initializer`; the bias starts at 0."""
        self.conv.initialize(initializer)

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax sees, (B, T, output_dim), from states (B, T, C)."""
        return state[..., self.hidden_dim - self.output_dim : self.hidden_dim]

    def remembered(self, mem_len: int) -> int:
        """Positions to keep where any are asked for: those the convolution looks back at."""
        return self.kernel_size - 1 if mem_len else 0

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> TrellisMasks:
        """Draw the masks of one forward pass, to be held through every solve in it.

        Args:
            batch: rows, B.
            length, memory: positions; no mask depends on them.
            like: a tensor of the device and dtype to use.
        """
        past_taps = (4 * self.hidden_dim, (self.kernel_size - 1) * self.hidden_dim)
        return TrellisMasks(
            hidden=variational_mask(like, (batch, 1, self.hidden_dim), self.dropout, self.training),
            weight=variational_mask(like, past_taps, self.weight_dropout, self.training),
        )

    def prepare(self, masks: TrellisMasks) -> PreparedTrellis:
        """The weights of one forward pass: dropped and normalised once."""
        mask = masks.weight
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], self.hidden_dim)], 1)
        weight = self.conv.weight(mask)
        assert self.conv.bias is not None
        own = (self.kernel_size - 1) * self.hidden_dim
        return PreparedTrellis(self, masks, weight, weight[:, :own], weight[:, own:], self.conv.bias)


@dataclass(frozen=True)
class TrellisMasks:
    """Masks of one forward pass; None where nothing is dropped."""

    hidden: Tensor | None  # (B, 1, H)
    weight: Tensor | None  # (4H, (k-1)H)


@dataclass(frozen=True)
class PreparedTrellis:
    """A cell with the weights of one forward pass: (4H, kH) with the oldest tap first."""

    cell: TrellisCell
    masks: TrellisMasks
    weight: Tensor
    past_taps: Tensor  # (4H, (k-1)H), taps k-1 .. 1
    own_tap: Tensor  # (4H, H), tap 0
    bias: Tensor  # (4H,)

    def settled(self, state: Tensor, injection: Tensor, past: TrellisPast | None) -> TrellisPast:
        """What later positions need of settled ones.

        Args:
            state: equilibria, (B, S, C).
            injection: their injections; not needed.
            past: what stood before them; None: zeros.
        """
        hidden, cell = state.split(self.cell.hidden_dim, -1)
        past = past or self.beginning(state)
        reach = self.cell.kernel_size - 1
        hidden = torch.cat([past.hidden, hidden[:, -reach:]], 1)[:, -reach:]
        # A view would keep the whole segment in memory; there may be no position at all.
        return TrellisPast(hidden, torch.cat([past.cell, cell[:, -1:]], 1)[:, -1:].clone())

    def beginning(self, like: Tensor) -> TrellisPast:
        """The state before a text: zeros, for the rows of `like` (B, ...)."""
        batch, width = like.shape[0], self.cell.hidden_dim
        zeros = like.new_zeros(batch, self.cell.kernel_size - 1, width)
        return TrellisPast(zeros, like.new_zeros(batch, 1, width))

    def bind(
        self, injection: Tensor, past: TrellisPast | None, padding: Tensor | None = None, start: int = 0
    ) -> BoundTrellis:
        """f(z) for one segment, with all that does not depend on z computed here, once.

        Args:
            injection: u of the segment, (B, T, 4*H).
            past: the state before the segment; None: zeros.
            padding: (B, M + T) bool, True at positions whose state is zero, as before a text.
            start: unused; no mask depends on the position.
        """
        return BoundTrellis(self, injection, past or self.beginning(injection), padding)


class BoundTrellis:
    """z -> f(z) over (B, T, C), for one segment; `restrict` and `column` evaluate it at some positions."""

    direction = 1  # a position depends on itself and on those before it

    def __init__(
        self, prepared: PreparedTrellis, injection: Tensor, past: TrellisPast, padding: Tensor | None
    ) -> None:
        self.p, self.past = prepared, past
        self.width, self.reach = prepared.cell.hidden_dim, prepared.cell.kernel_size - 1
        self.batch, self.length = injection.shape[:2]
        self.injection = injection + prepared.bias
        self.before = apply_mask(past.hidden, prepared.masks.hidden)  # (B, k-1, H)
        self.keep = None if padding is None else (~padding[:, -self.length :]).to(injection.dtype)  # (B, T)

    def __call__(self, z: Tensor) -> Tensor:
        fz = gated(self.gates(z), self.cells_before(z))
        return fz if self.keep is None else fz * self.keep.unsqueeze(-1)

    def gates(self, z: Tensor) -> Tensor:
        """The gates before their nonlinearities, (B, T, 4H)."""
        rows = self.windows(z).reshape(self.batch * self.length, -1)
        return rowwise_linear(rows, self.p.weight).view_as(self.injection) + self.injection

    def windows(self, z: Tensor) -> Tensor:
        """What the convolution sees of h at each position, (B, T, kH), oldest first."""
        hidden = apply_mask(z[..., : self.width], self.p.masks.hidden)
        seen = torch.cat([self.before, hidden], 1)
        return torch.cat([seen[:, j : j + self.length] for j in range(self.reach + 1)], -1)

    def cells_before(self, z: Tensor) -> Tensor:
        """c_{t-1} for each position, (B, T, H)."""
        return torch.cat([self.past.cell, z[:, :-1, self.width :]], 1)

    # ------------------------------------------------------------------ position after position

    @property
    def own(self) -> int:
        """Leading channels of a position through which it depends on itself: those of h."""
        return self.width

    @property
    def order(self) -> range:
        """The positions, each after all that it depends on."""
        return range(self.length)

    def start(self, z: Tensor, t: int) -> Tensor:
        """The h of the position before t, (B, H)."""
        return z[:, t - 1, : self.width] if t else self.past.hidden[:, -1]

    def column(self, z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        """f at position t of every sample, as a map of its h, with the positions before it held at z.

        Args:
            z: states, (B, T, C), settled before t.
            t: the position.
        Returns:
            (B, H) -> (B, C).
        """
        mask = self.p.masks.hidden
        mask = None if mask is None else mask[:, 0]
        first = t - self.reach
        hidden = apply_mask(z[:, max(first, 0) : t, : self.width], self.p.masks.hidden)
        if first < 0:
            hidden = torch.cat([self.before[:, first:], hidden], 1)
        held = rowwise_linear(hidden.flatten(1), self.p.past_taps) + self.injection[:, t]  # (B, 4H)
        cell = z[:, t - 1, self.width :] if t else self.past.cell[:, 0]
        keep = None if self.keep is None else self.keep[:, t : t + 1]

        def f(h: Tensor) -> Tensor:
            fz = gated(rowwise_linear(apply_mask(h, mask), self.p.own_tap) + held, cell)
            return fz if keep is None else fz * keep

        return f

    def adjoint(self, z: Tensor, grad: Tensor) -> TrellisAdjoint:
        """lambda -> J^T lambda + grad with J = df/dz at z, to be solved from the last position to the first.

        Args:
            z: states, (B, T, C).
            grad: (B, T, C).
        """
        taps = self.p.weight.unflatten(1, (self.reach + 1, self.width)).flip(1)
        mask = self.p.masks.hidden
        return TrellisAdjoint(self.gates(z), self.cells_before(z), taps, mask, self.keep, grad)

    # ------------------------------------------------------------------ at some positions only

    def restrict(
        self, z: Tensor, positions: Tensor, value: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """f at the flat `positions` (n,), sorted, with the others held at z (B, T, C): (n, C) -> (n, C)."""
        return _RestrictedTrellis(self, z, positions)


class _RestrictedTrellis:
    """f at some positions; what they see of all others is that of the state it was made from."""

    def __init__(self, bound: BoundTrellis, z: Tensor, positions: Tensor) -> None:
        self.p, self.width = bound.p, bound.width
        n, length, reach = positions.numel(), bound.length, bound.reach
        sample, time = positions // length, positions % length
        mask = bound.p.masks.hidden
        self.mask = None if mask is None else mask[:, 0].index_select(0, sample)
        self.injection = bound.injection.flatten(0, 1).index_select(0, positions)
        self.keep = (
            None if bound.keep is None else bound.keep.flatten().index_select(0, positions).unsqueeze(1)
        )
        self.held = bound.windows(z).flatten(0, 1).index_select(0, positions)  # (n, kH)
        self.held_cell = bound.cells_before(z).flatten(0, 1).index_select(0, positions)
        # Which row each tap sees; n stands for a position that is held.
        place = positions.new_full((bound.batch * length,), n)
        place[positions] = torch.arange(n, device=z.device)
        taps = torch.arange(reach, -1, -1, device=z.device)
        seen = (positions.unsqueeze(1) - taps).clamp(min=0)  # (n, k)
        moving = place[seen].masked_fill(time.unsqueeze(1) < taps, n)
        self.source = moving.clamp(max=n - 1)
        self.is_held = (moving == n).unsqueeze(-1)  # (n, k, 1)

    def __call__(self, rows: Tensor) -> Tensor:
        hidden, cell = rows.split(self.width, -1)
        hidden = apply_mask(hidden, self.mask)
        n = hidden.shape[0]
        held = self.held.view(n, -1, self.width)
        windows = torch.where(self.is_held, held, hidden[self.source]).flatten(1)
        before = torch.where(self.is_held[:, -2], self.held_cell, cell[self.source[:, -2]])
        fz = gated(rowwise_linear(windows, self.p.weight) + self.injection, before)
        return fz if self.keep is None else fz * self.keep


def gated(gates: Tensor, before: Tensor) -> Tensor:
    """(h', c') side by side, (..., 2H), from the gates (..., 4H) before their nonlinearities and c_{t-1}."""
    i, o, g, f = gates.chunk(4, -1)
    cell = f.sigmoid() * before + i.sigmoid() * g.tanh()
    return torch.cat([o.sigmoid() * cell.tanh(), cell], -1)
