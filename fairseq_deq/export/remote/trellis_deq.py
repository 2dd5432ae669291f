"""The DEQ-TrellisNet layer: a causal convolution of the hidden state, and the gates of an LSTM.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rows_deq import rowwise_linear


@dataclass(frozen=True)
class TrellisPast:
    """The states before a segment that its positions read; zeros before a text.

    Attributes:
        hidden: h of the last k-1 positions, (B, k-1, H).
        cell: c of the last position, (B, 1, H).
    """

    hidden: Tensor
    cell: Tensor

    def reordered(self, order: Tensor) -> TrellisPast:
        """The texts with these indices, (B',), in that order."""
        return TrellisPast(self.hidden.index_select(0, order), self.cell.index_select(0, order))


class TrellisLayer(nn.Module):
    """One TrellisNet layer f(z; u), z = (h, c), to be solved for z = f(z; u).

    With k taps W_j,
        (i, o, g, f)_t = u_t + b + sum_{j<k} W_j h_{t-j},
        c'_t = sigma(f_t) * c_{t-1} + sigma(i_t) * tanh(g_t),   h'_t = sigma(o_t) * tanh(c'_t).

    Args:
        hidden_dim: channels of h and of c, H; a state has C = 2*H.
        output_dim: channels of the features, which are the last ones of h.
        kernel_size: number of taps, k >= 2.
    Source: Bai, Kolter, Koltun (2019, arXiv 1810.06682 and 1909.01377).
    """

    def __init__(self, hidden_dim: int, output_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.hidden_dim, self.output_dim, self.reach = hidden_dim, output_dim, kernel_size - 1
        self.conv = nn.Linear(kernel_size * hidden_dim, 4 * hidden_dim)  # the oldest tap first

    @property
    def state_dim(self) -> int:
        """Channels of the state, C."""
        return 2 * self.hidden_dim

    @property
    def injection_dim(self) -> int:
        """Channels of the injection u."""
        return 4 * self.hidden_dim

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax reads, (B, T, output_dim)."""
        return state[..., self.hidden_dim - self.output_dim : self.hidden_dim]

    def beginning(self, batch: int, like: Tensor) -> TrellisPast:
        """The past at the beginning of a text: zeros."""
        zeros = like.new_zeros(batch, self.reach, self.hidden_dim)
        return TrellisPast(zeros, like.new_zeros(batch, 1, self.hidden_dim))

    def bind(self, u: Tensor, past: TrellisPast, lengths: Tensor) -> BoundTrellis:
        """f over the positions that follow.

        Args:
            u: injections, (B, T, 4*H).
            past: the states before.
            lengths: unused, because a position reads only the last few states.
        """
        return BoundTrellis(self, u, past)


class BoundTrellis:
    """z -> f(z) over (B, T, C)."""

    def __init__(self, layer: TrellisLayer, u: Tensor, past: TrellisPast) -> None:
        self.layer, self.past, self.width, self.reach = layer, past, layer.hidden_dim, layer.reach
        self.batch, self.length = u.shape[:2]
        self.injection = u + layer.conv.bias
        own = layer.reach * layer.hidden_dim
        self.past_taps, self.own_tap = layer.conv.weight[:, :own], layer.conv.weight[:, own:]

    def __call__(self, z: Tensor) -> Tensor:
        seen = torch.cat([self.past.hidden, z[..., : self.width]], 1)
        windows = torch.cat([seen[:, j : j + self.length] for j in range(self.reach + 1)], -1)
        rows = rowwise_linear(windows.reshape(self.batch * self.length, -1), self.layer.conv.weight)
        before = torch.cat([self.past.cell, z[:, :-1, self.width :]], 1)
        return gated(rows.view_as(self.injection) + self.injection, before)

    def column(self, z: Tensor, t: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """f at position t as a function of its own h, and the h before it, at which its solve starts.

        Args:
            z: states, (B, T, C); positions before t are settled.
            t: the position.
        Returns:
            the map (B, H) -> (B, C), and the start, (B, H).
        """
        hidden = torch.cat([self.past.hidden, z[:, :t, : self.width]], 1)[:, -self.reach :]
        held = rowwise_linear(hidden.flatten(1), self.past_taps) + self.injection[:, t]
        cell = z[:, t - 1, self.width :] if t else self.past.cell[:, 0]
        return lambda h: gated(rowwise_linear(h, self.own_tap) + held, cell), hidden[:, -1]

    def settle(self, z: Tensor, counts: Tensor) -> TrellisPast:
        """The past after these positions, settled at z.

        Args:
            z: their states, (B, T, C).
            counts: how many of them are real in each text, (B,).
        """
        hidden = torch.cat([self.past.hidden, z[..., : self.width]], 1)
        cell = torch.cat([self.past.cell, z[..., self.width :]], 1)
        return TrellisPast(last_of(hidden, counts + self.reach, self.reach), last_of(cell, counts + 1, 1))


def last_of(x: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The last `count` of the first `lengths` (B,) positions of x (B, S, C): (B, count, C)."""
    place = (lengths - count).unsqueeze(1) + torch.arange(count, device=x.device)
    return x.gather(1, place.unsqueeze(2).expand(-1, -1, x.shape[2]))


def gated(gates: Tensor, before: Tensor) -> Tensor:
    """(h', c'), (..., 2H), from c_{t-1} and the gates before sigma and tanh, (..., 4H)."""
    i, o, g, f = gates.chunk(4, -1)
    cell = f.sigmoid() * before + i.sigmoid() * g.tanh()
    return torch.cat([o.sigmoid() * cell.tanh(), cell], -1)
