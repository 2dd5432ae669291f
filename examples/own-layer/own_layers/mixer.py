"""A causal MLP-mixer at its equilibrium: one network mixes positions, another one channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_deq.layers.window import WindowLayer
from fairseq_deq.models.own_layer import register_layer


@register_layer("deq_mixer_lm")
class Mixer(WindowLayer):
    """h = LN(z_t + M(z_{t-k+1}, ..., z_t) + u_t),  f(z; u)_t = LN(h + W_2 gelu(W_1 h)).

    M is a small network over the k positions, the same for every channel.

    Args:
        dim: channels of the state, C; --decoder-embed-dim.
        reach: positions that one sees, k; --reach.
        hidden: channels inside the second network; --hidden.
    Source: Tolstikhin et al. (2021, arXiv 2105.01601), made causal.
    """

    def __init__(self, dim: int, reach: int = 8, hidden: int = 512) -> None:
        super().__init__(state_dim=dim, injection_dim=dim, window=reach)
        self.positions_in = nn.Linear(reach, 4 * reach)
        self.positions_out = nn.Linear(4 * reach, 1)
        self.channels_in = nn.Linear(dim, hidden)
        self.channels_out = nn.Linear(hidden, dim)

    def forward(self, states: Tensor, injection: Tensor) -> Tensor:
        """f at n positions: states (n, k, C) and injections (n, C) to (n, C)."""
        width = injection.shape[-1:]
        mixed = self.positions_out(F.gelu(self.positions_in(states.transpose(1, 2)))).squeeze(-1)  # (n, C)
        h = F.layer_norm(states[:, -1] + mixed + injection, width)
        return F.layer_norm(h + self.channels_out(F.gelu(self.channels_in(h))), width)
