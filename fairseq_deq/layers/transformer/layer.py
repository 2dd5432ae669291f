"""The parameters of the DEQ-Transformer layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dropout import variational_mask
from ..layer import Layer, PreparedLayer
from ..weight_norm import Initializer, WeightNormLinear
from .activation import Activation
from .cache import KVCache
from .norm import NormParameters
from .positions import POSITIONS, RelativeWeights
from .segment import Segment
from .weights import DropoutMasks, KeysValues, TransformerWeights
from .whole import BoundTransformer


class TransformerLayer(Layer):
    """One Transformer-XL layer f(z; u), to be solved for z = f(z; u).

    With [q, k, v] = W_qkv z + u over context and segment,
        A_ij = ((q_i + r_w) . k_j + (q_i + r_r) . (W_r R_{i-j})) / sqrt(D), j <= i,
        or with rotary positions A_ij = (G_i q_i) . (G_j k_j) / sqrt(D) (see `Rotation`),
        a = drop(W_o softmax(A) v),
        F(x) = drop(W_2 drop(act(W_1 x))), or gated F(x) = drop(W_2 drop(act(W_1 x) * W_3 x)),
    post-norm:  h = LN(a + z),  f = LN(h + F(h)),
    pre-norm:   h = a + z with attention on LN(z),  f = LN(h + F(LN(h))).
    With `input_residual`, u has a further part u_h, and a + z + u_h takes the place of a + z.

    Each LN has its own parameters, if any, and is a layer norm or an RMS norm (see `Norm`). The last LN of
    the pre-norm form bounds f, so that an equilibrium exists. With `closing_norm=False` the pre-norm form is
    that of the reference code, which is bounded as well:
                h = LN(a + z) with attention on LN(z),  f = h + F(h).

    Args:
        dim: channels of z, C.
        ffn_dim: channels inside the feed-forward part.
        heads: attention heads, H.
        head_dim: channels of a head, D.
        pre_norm: True for the pre-norm form, False for the post-norm form.
        closing_norm: False makes the pre-norm form that of the reference code.
        activation: act: `relu`, `gelu` or `silu` (see `Activation`).
        gated_ffn: whether the feed-forward part is gated.
        norm: `layer` or `rms`.
        input_residual: whether u has the part u_h, C more channels.
        positions: `relative` or `rotary`; with `rotary` there are no W_r, r_w and r_r.
        norm_affine: whether each norm has a gain, and each layer norm a bias too.
        weight_norm: whether the matrices W are weight-normalised.
        dropout: probability of dropping a channel, at each `drop` above and of R, at all positions alike.
        attention_dropout: probability of dropping an attention weight.
        local_size: positions that a query sees, itself included; 0: all up to itself.
    Raises:
        ValueError: `positions`, `norm` or `activation` is none of these, or `rotary` has an odd `head_dim`.
    Source: Dai et al. (2019, arXiv 1901.02860); Bai, Kolter, Koltun (2019, arXiv 1909.01377); of the gated
    feed-forward part Shazeer (2020, arXiv 2002.05202).
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        head_dim: int,
        pre_norm: bool,
        weight_norm: bool,
        dropout: float,
        attention_dropout: float,
        local_size: int,
        closing_norm: bool = True,
        activation: str = "relu",
        gated_ffn: bool = False,
        norm: str = "layer",
        norm_affine: bool = False,
        input_residual: bool = False,
        positions: str = "relative",
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {positions!r}")
        if positions == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions need an even number of channels of a head, got {head_dim}")
        inner = heads * head_dim
        super().__init__(state_dim=dim, injection_dim=3 * inner + (dim if input_residual else 0))
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.local_size, self.activation = local_size, Activation(activation, gated_ffn)
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.qkv = WeightNormLinear(dim, 3 * inner, bias=False, weight_norm=weight_norm)
        relative = positions == "relative"
        self.relative = (
            WeightNormLinear(dim, inner, bias=False, weight_norm=weight_norm) if relative else None
        )
        self.out = WeightNormLinear(inner, dim, bias=True, weight_norm=weight_norm)
        self.ffn_in = WeightNormLinear(dim, ffn_dim, bias=True, weight_norm=weight_norm)
        self.ffn_out = WeightNormLinear(ffn_dim, dim, bias=True, weight_norm=weight_norm)
        self.ffn_gate = (
            WeightNormLinear(dim, ffn_dim, bias=True, weight_norm=weight_norm) if gated_ffn else None
        )
        self.attention_norm = NormParameters(dim, norm, norm_affine) if pre_norm else None
        self.middle_norm = NormParameters(dim, norm, norm_affine)
        self.closing_norm = NormParameters(dim, norm, norm_affine) if closing_norm else None
        self.content_bias = nn.Parameter(torch.zeros(heads, head_dim)) if relative else None  # r_w
        self.position_bias = nn.Parameter(torch.zeros(heads, head_dim)) if relative else None  # r_r

    def initialize(self, initializer: Initializer) -> None:
        """Draw every weight from `initializer`; biases of linear maps and norms start at 0, gains at 1."""
        for linear in (self.qkv, self.relative, self.out, self.ffn_in, self.ffn_gate, self.ffn_out):
            if linear is not None:
                linear.initialize(initializer)
        with torch.no_grad():
            for bias in (self.content_bias, self.position_bias):
                if bias is not None:
                    initializer.fill(bias)

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> DropoutMasks:
        """Draw the dropout masks of one forward pass; every solve of the pass uses the same ones.

        Args:
            batch, length, memory: samples, positions and remembered positions, B, T and M.
            like: a tensor of the device and dtype to use.
        """

        def mask(p: float, *shape: int) -> Tensor | None:
            return variational_mask(like, shape, p, self.training)

        return DropoutMasks(
            hidden=mask(self.dropout, batch, self.dim),
            ffn_inner=mask(self.dropout, batch, self.ffn_in.weight_v.shape[0]),
            ffn_outer=mask(self.dropout, batch, self.dim),
            relative=None if self.relative is None else mask(self.dropout, 1, self.dim),
            attention=mask(self.attention_dropout, batch, self.heads, length, length + memory),
        )

    def weights(self, masks: DropoutMasks) -> TransformerWeights:
        """The weights of one forward pass; weight norm and the factor 1/sqrt(D) are applied here, once."""
        inner = self.heads * self.head_dim
        qkv = self.qkv.weight()
        ffn_in, ffn_in_bias = self.ffn_in.weight(), self.ffn_in.required_bias()
        if self.ffn_gate is not None:  # W_1 and W_3 in one matrix product
            ffn_in = torch.cat([ffn_in, self.ffn_gate.weight()])
            ffn_in_bias = torch.cat([ffn_in_bias, self.ffn_gate.required_bias()])
        return TransformerWeights(
            heads=self.heads,
            head_dim=self.head_dim,
            attention_norm=None if self.attention_norm is None else self.attention_norm.norm(),
            middle_norm=self.middle_norm.norm(),
            closing_norm=None if self.closing_norm is None else self.closing_norm.norm(),
            activation=self.activation,
            local_size=self.local_size,
            query=qkv[:inner] * self.head_dim**-0.5,
            key_value=qkv[inner:],
            out=self.out.weight(),
            ffn_in=ffn_in,
            ffn_out=self.ffn_out.weight(),
            out_bias=self.out.required_bias(),
            ffn_in_bias=ffn_in_bias,
            ffn_out_bias=self.ffn_out.required_bias(),
            relative=self._relative_weights(),
            masks=masks,
        )

    def _relative_weights(self) -> RelativeWeights | None:
        if self.relative is None or self.content_bias is None or self.position_bias is None:
            return None
        return RelativeWeights(self.relative.weight(), self.content_bias, self.position_bias)

    def prepare(self, masks: DropoutMasks) -> PreparedTransformer:
        """The layer with the weights of one forward pass and these masks."""
        return PreparedTransformer(self.weights(masks))


class PreparedTransformer(PreparedLayer):
    """The layer with the weights of one forward pass; its context is a `KeysValues`.

    Args:
        weights: the weights, with the dropout masks.
    """

    def __init__(self, weights: TransformerWeights) -> None:
        self.weights = weights

    def context(self, record: Tensor, injection: Tensor, context: KeysValues | None) -> KeysValues:
        weights, first = self.weights, 0 if context is None else context.length
        rotation = weights.rotation(first, record.shape[1], record)
        own = KeysValues.of(weights, record, weights.split_injection(injection)[1], rotation)
        return own if context is None else context.followed_by(own)

    def bind(
        self, injection: Tensor, context: KeysValues | None, padding: Tensor | None = None, start: int = 0
    ) -> BoundTransformer:
        return BoundTransformer(Segment.of(self.weights, injection, context, padding, start))

    def new_cache(self, batch: int) -> KVCache:
        return KVCache(self.weights, batch)
