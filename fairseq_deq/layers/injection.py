"""The injection: how the embedded tokens enter the layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..invariant_matmul import rowwise_linear
from .weight_norm import Initializer


class Injection(nn.Linear):
    """u_t = W [x_{t-w+1}; ...; x_t] + b: a causal convolution over embeddings x, once per forward pass.

    Args:
        dim: channels of x, D.
        injection_dim: channels of u.
        window: number of tokens that each u_t is made of, w; 1 makes it a linear map.
        weight_norm: whether W = g * V / |V|, with a norm per row; then `weight` is V, and `gain` is g.
    """

    def __init__(self, dim: int, injection_dim: int, window: int = 1, weight_norm: bool = False) -> None:
        super().__init__(window * dim, injection_dim)
        self.window = window
        self.gain = nn.Parameter(torch.empty(injection_dim, 1)) if weight_norm else None

    @torch.no_grad()
    def initialize(self, initializer: Initializer) -> None:
        """Draw W from `initializer`; the bias starts at 0."""
        initializer.fill(self.weight)
        if self.gain is not None:
            self.gain.copy_(self.weight.norm(dim=1, keepdim=True))
        self.bias.zero_()

    def normalized_weight(self) -> Tensor:
        """W, (injection_dim, w*D)."""
        return self.weight if self.gain is None else torch._weight_norm(self.weight, self.gain, 0)

    def forward(self, x: Tensor, before: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """u, (B, T, injection_dim).

        Args:
            x: embeddings, (B, T, D).
            before: embeddings of the S positions before x, (B, S, D); where S < w-1, zeros precede them.
            weight: W, if it has been normalised already. Meant for a few positions at a time, because the
                rounding of a row may then depend on the number of rows. None: W is computed here.
        """
        batch, length, dim = x.shape
        if self.window > 1:
            reach = self.window - 1
            zeros = x.new_zeros(batch, reach, dim)
            seen = torch.cat([zeros, x] if before is None else [zeros, before.to(x.dtype), x], 1)
            seen = seen[:, -(reach + length) :]
            x = torch.cat([seen[:, j : j + length] for j in range(self.window)], -1)
        if weight is not None:
            return F.linear(x, weight, self.bias)
        rows = rowwise_linear(x.reshape(batch * length, -1), self.normalized_weight(), self.bias)
        return rows.view(batch, length, -1)
