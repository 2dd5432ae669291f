"""The parameters of the DEQ-TrellisNet layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import variational_mask
from ..layer import Layer, PreparedLayer
from ..weight_norm import Initializer, WeightNormLinear
from .segment import TrellisContext, TrellisMasks, TrellisSegment, TrellisWeights
from .whole import BoundTrellis


class TrellisLayer(Layer):
    """One TrellisNet layer f(z; u), z = (h, c), to be solved for z = f(z; u).

    With k taps W_j, zeros in place of positions before the text, and d a dropout mask,
        (i, o, g, f)_t = u_t + b + sum_{j<k} W_j (d * h_{t-j}),
        c'_t = sigma(f_t) * c_{t-1} + sigma(i_t) * tanh(g_t),   h'_t = sigma(o_t) * tanh(c'_t).
    So f at t depends on h_t, on the k-1 hidden states before it and on c_{t-1}, and on no later position.

    Args:
        hidden_dim: channels of h and of c, H; a state has C = 2*H.
        output_dim: channels of the output, which are the last ones of h.
        kernel_size: number of taps, k >= 2.
        weight_norm: whether W, all taps together, is weight-normalised.
        dropout: probability of dropping a channel of h inside the convolution, at all positions.
        weight_dropout: probability of dropping a weight of the taps j >= 1.
    Source: Bai, Kolter, Koltun (2019, arXiv 1810.06682 and 1909.01377).
    """

    is_recurrent = True

    def __init__(
        self,
        hidden_dim: int,
        output_dim: int,
        kernel_size: int,
        weight_norm: bool,
        dropout: float,
        weight_dropout: float,
    ) -> None:
        super().__init__(state_dim=2 * hidden_dim, injection_dim=4 * hidden_dim)
        self.own_dim, self.output_dim = hidden_dim, output_dim
        self.hidden_dim, self.kernel_size = hidden_dim, kernel_size
        self.dropout, self.weight_dropout = dropout, weight_dropout
        self.conv = WeightNormLinear(kernel_size * hidden_dim, 4 * hidden_dim, True, weight_norm)

    def initialize(self, initializer: Initializer) -> None:
        """Draw the weights from `initializer`; the bias starts at 0."""
        self.conv.initialize(initializer)

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax sees, (B, T, output_dim), from states (B, T, C)."""
        return state[..., self.hidden_dim - self.output_dim : self.hidden_dim]

    def memory_length(self, mem_len: int) -> int:
        """Number of positions to keep: k-1, which the convolution reads; 0 if `mem_len` is 0."""
        return self.kernel_size - 1 if mem_len else 0

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> TrellisMasks:
        """Draw the dropout masks of one forward pass; every solve of the pass uses the same ones.

        Args:
            batch: number of samples, B.
            length, memory: numbers of positions; no mask depends on them.
            like: a tensor of the device and dtype to use.
        """
        past_taps = (4 * self.hidden_dim, (self.kernel_size - 1) * self.hidden_dim)
        return TrellisMasks(
            hidden=variational_mask(like, (batch, 1, self.hidden_dim), self.dropout, self.training),
            weight=variational_mask(like, past_taps, self.weight_dropout, self.training),
        )

    def weights(self, masks: TrellisMasks) -> TrellisWeights:
        """The weights of one forward pass; weight dropout and weight norm are applied here, once."""
        mask = masks.weight
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], self.hidden_dim)], 1)
        bias = self.conv.required_bias()
        return TrellisWeights(self.hidden_dim, self.kernel_size, self.conv.weight(mask), bias, masks)

    def prepare(self, masks: TrellisMasks) -> PreparedTrellis:
        """The layer with the weights of one forward pass and these masks."""
        return PreparedTrellis(self.weights(masks))


class PreparedTrellis(PreparedLayer):
    """The layer with the weights of one forward pass; its context is a `TrellisContext`.

    Args:
        weights: the weights, with the dropout masks.
    """

    def __init__(self, weights: TrellisWeights) -> None:
        self.weights = weights

    def context(self, record: Tensor, injection: Tensor, context: TrellisContext | None) -> TrellisContext:
        return (context or TrellisContext.beginning(self.weights, record)).followed_by(record)

    def bind(
        self, injection: Tensor, context: TrellisContext | None, padding: Tensor | None = None, start: int = 0
    ) -> BoundTrellis:
        return BoundTrellis(TrellisSegment.of(self.weights, injection, context, padding))
