"""The equations of the DEQ-TrellisNet layer as they are written on paper: slow, and easy to check.

Everything else in this folder computes the same, faster; the tests compare the two in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import apply_mask
from .segment import TrellisWeights


def reference(
    z: Tensor, u: Tensor, weights: TrellisWeights, before: int = 0, padding: Tensor | None = None
) -> Tensor:
    """f(z; u) over a whole text.

    Args:
        z: states (h, c) of all positions, (B, S, 2H); those of the context come first.
        u: their injections, (B, S, 4H).
        weights: of the layer, with weight dropout applied, and with the dropout mask of h.
        before: number of positions of the context, at which f is not computed.
        padding: (B, S) bool, True at positions where f is zero, as states are before a text; None: none.
    Returns:
        f at the positions after the context, (B, S - before, 2H).
    """
    width, reach = weights.hidden_dim, weights.kernel_size - 1
    h, c = z.split(width, -1)
    seen = apply_mask(h, weights.masks.hidden)  # d * h
    # The tap of the oldest position is stored first: W_j has index k-1-j.
    taps = weights.taps.split(width, 1)
    states = []
    for t in range(before, z.shape[1]):
        gates = u[:, t] + weights.bias
        for j in range(min(reach, t) + 1):  # positions before the text are zero
            gates = gates + seen[:, t - j] @ taps[reach - j].T
        i, o, g, f = gates.chunk(4, -1)
        cell = torch.sigmoid(i) * torch.tanh(g)
        if t > 0:
            cell = cell + torch.sigmoid(f) * c[:, t - 1]
        states.append(torch.cat([torch.sigmoid(o) * torch.tanh(cell), cell], -1))
    fz = torch.stack(states, 1)
    return fz if padding is None else fz.masked_fill(padding[:, before:].unsqueeze(-1), 0.0)
