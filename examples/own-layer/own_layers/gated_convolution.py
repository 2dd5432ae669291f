"""A gated causal convolution at its equilibrium: every position looks at itself and at a few before it."""

from __future__ import annotations

from torch import Tensor, nn

from fairseq_deq.layers.window import WindowLayer
from fairseq_deq.models.own_layer import register_layer


@register_layer("deq_gated_convolution_lm")
class GatedConvolution(WindowLayer):
    """f(z; u)_t = tanh(a) * sigmoid(g), with [a; g] = W [z_{t-k+1}; ...; z_t] + u_t.

    One evaluation looks k-1 positions back; at the equilibrium a position depends on all before it.

    Args:
        dim: channels of the state, C; --decoder-embed-dim.
        taps: positions that one sees, k; --taps.
    Source: the gate of Dauphin et al. (2017, arXiv 1612.08083).
    """

    def __init__(self, dim: int, taps: int = 3) -> None:
        super().__init__(state_dim=dim, injection_dim=2 * dim, window=taps)
        self.convolution = nn.Linear(taps * dim, 2 * dim)

    def forward(self, states: Tensor, injection: Tensor) -> Tensor:
        """f at n positions: states (n, k, C) and injections (n, 2*C) to (n, C)."""
        value, gate = (self.convolution(states.flatten(1)) + injection).chunk(2, -1)
        return value.tanh() * gate.sigmoid()
