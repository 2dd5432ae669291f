"""The transposed Jacobian of the TrellisNet layer, at all positions side by side or one after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...invariant_matmul import rowwise_linear
from ..dropout import apply_mask
from .segment import TrellisSegment


class TrellisAdjoint:
    """lambda -> J^T lambda + grad for the layer of `TrellisLayer`, J = df/dz at z, without autograd.

    Let lambda = (l, m) for (h, c); i, o, g, f the gates after sigma and tanh, and c the new cell, all at z.
    Then
        n_t = m_t + l_t * o * (1 - tanh(c)^2)
        e_t = (n * g*i*(1-i), l * tanh(c)*o*(1-o), n * i*(1-g^2), n * c_{t-1}*f*(1-f))
    are the gradients with respect to c'_t and to the gates before sigma and tanh, and position t of J^T
    lambda is
        (d * sum_{j<k} W_j^T e_{t+j}, f_{t+1} * n_{t+1}).
    So l_t depends on itself and on the next k-1 positions, and m_t on the next position alone. The map is
    also a `Recurrent`, solved from the last position to the first.

    Args:
        segment: everything that f reads besides z; its hidden mask is d.
        z: the state at which J is taken, (B, T, 2H).
        grad: the vector that is added, (B, T, 2H).
    """

    direction = -1  # each position depends on itself and on later ones

    def __init__(self, segment: TrellisSegment, z: Tensor, grad: Tensor) -> None:
        weights, keep, mask = segment.weights, segment.keep, segment.weights.masks.hidden
        gates, before = segment.gates(z), segment.cells_before(z)  # (B, T, 4H), (B, T, H)
        taps = weights.taps.unflatten(1, (-1, segment.width)).flip(1)  # (4H, k, H), tap j at index j
        self.width, self.reach, self.length = segment.width, weights.reach, segment.length
        self.mask = None if mask is None else mask[:, 0]
        self.grad = grad
        i, o, g, f = gates.chunk(4, -1)
        i, o, g, f = i.sigmoid(), o.sigmoid(), g.tanh(), f.sigmoid()
        tanh_cell = (f * before + i * g).tanh()
        share = o * (1 - tanh_cell.square())  # n_t = m_t + share * l_t
        of_cell = torch.stack(
            [g * i * (1 - i), torch.zeros_like(i), i * (1 - g * g), before * f * (1 - f)], 2
        )
        of_hidden = share.unsqueeze(2) * of_cell
        of_hidden[:, :, 1] = tanh_cell * o * (1 - o)
        # e_t = of_hidden * l_t + of_cell * m_t, (B, T, 4, H); f_t * n_t = forget_hidden * l_t + forget * m_t.
        self.of_hidden, self.of_cell, self.forget_hidden, self.forget = of_hidden, of_cell, f * share, f
        if keep is not None:
            for factor in (self.of_hidden, self.of_cell, self.forget_hidden, self.forget):
                factor *= keep.view(*keep.shape, *[1] * (factor.dim() - 2))
        self.taps = taps.permute(2, 1, 0).reshape(self.width, -1)  # (H, k*4H), tap 0 first
        self.own_tap = self.taps[:, : 4 * self.width].contiguous()
        self.next_taps = self.taps[:, 4 * self.width :].contiguous()

    def __call__(self, adjoint: Tensor) -> Tensor:
        """J^T lambda + grad, (B, T, 2H), at all positions at once."""
        hidden, cell = adjoint.split(self.width, -1)
        errors = (self.of_hidden * hidden.unsqueeze(2) + self.of_cell * cell.unsqueeze(2)).flatten(2)
        after = F.pad(errors, (0, 0, 0, self.reach))
        windows = torch.cat([after[:, j : j + self.length] for j in range(self.reach + 1)], -1)
        to_hidden = rowwise_linear(windows.flatten(0, 1), self.taps).view_as(hidden)
        to_hidden = apply_mask(to_hidden, None if self.mask is None else self.mask.unsqueeze(1))
        forgotten = self.forget_hidden * hidden + self.forget * cell
        return torch.cat([to_hidden, F.pad(forgotten[:, 1:], (0, 0, 0, 1))], -1) + self.grad

    @property
    def own(self) -> int:
        """The number of leading channels through which each position depends on itself: those of l."""
        return self.width

    @property
    def order(self) -> range:
        """The positions in the order in which they are solved: each after all that it depends on."""
        return range(self.length - 1, -1, -1)

    def start(self, adjoint: Tensor, t: int) -> Tensor:
        """Where the solve for l_t starts, (B, H): the first part of grad at t."""
        return self.grad[:, t, : self.width]

    def column(self, adjoint: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        """The map at position t as a function of its own l, with all later positions held at `adjoint`.

        Args:
            adjoint: lambda, (B, T, 2H); positions after t are settled.
            t: the position.
        Returns:
            (B, H) -> (B, 2H).
        """
        held, cell = self.grad[:, t].split(self.width, -1)  # (B, H) each
        after = slice(t + 1, t + 1 + self.reach)
        hidden_after, cell_after = adjoint[:, after].split(self.width, -1)
        seen = hidden_after.shape[1]
        if seen:
            errors = self.of_hidden[:, after] * hidden_after.unsqueeze(2)
            errors += self.of_cell[:, after] * cell_after.unsqueeze(2)
            taps = self.next_taps[:, : seen * 4 * self.width]
            held = held + apply_mask(rowwise_linear(errors.flatten(1), taps), self.mask)
            forget, forget_hidden = self.forget[:, t + 1], self.forget_hidden[:, t + 1]
            cell = cell + forget * cell_after[:, 0] + forget_hidden * hidden_after[:, 0]
        of_cell = (self.of_cell[:, t] * cell.unsqueeze(1)).flatten(1)
        held = held + apply_mask(rowwise_linear(of_cell, self.own_tap), self.mask)
        of_hidden = self.of_hidden[:, t]

        def f(adjoint_hidden: Tensor) -> Tensor:
            errors = (of_hidden * adjoint_hidden.unsqueeze(1)).flatten(1)
            own = apply_mask(rowwise_linear(errors, self.own_tap), self.mask)
            return torch.cat([own + held, cell], -1)

        return f
