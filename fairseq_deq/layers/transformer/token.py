"""The DEQ-Transformer layer at one new position of each text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import Rotation
from .weights import TransformerWeights


@dataclass(frozen=True)
class TokenWeights:
    """The matrices of the layer, transposed, (in, out).

    On a CPU they are copied: a product with a few rows is up to twice as fast as with a view of the matrix.
    """

    layer: TransformerWeights
    qkv: Tensor
    out: Tensor
    ffn_in: Tensor
    ffn_out: Tensor

    @classmethod
    def of(cls, weights: TransformerWeights) -> TokenWeights:
        """Transpose the matrices of `weights`."""
        qkv = torch.cat([weights.query, weights.key_value])
        matrices = (qkv, weights.out, weights.ffn_in, weights.ffn_out)
        on_cpu = qkv.device.type == "cpu"
        return cls(weights, *(matrix.t().contiguous() if on_cpu else matrix.t() for matrix in matrices))


class TokenTransformer:
    """f at the next position of each text: (B, 1, C), or (B, C), to the same shape.

    The position's own key and value change with z. Each evaluation writes them into the last column of `keys`
    and `values`.

    Args:
        weights: of the layer, without dropout.
        injection: [(u_q + r_w)/sqrt(D), u_k, u_v], (B, 3*H*D); without r_w for rotary positions.
        keys, values: those of the S settled positions, and room for its own, (H, B, D, S + 1) and
            (H, B, S + 1, D).
        relative: W_r R in the order of the keys, (H, D, S + 1); None: positions are rotary.
        rotation: of the new position; None: positions are relative.
        bias: z-independent part of the scores, (1 or H, 1 or B, S + 1).
        residual: u_h, (B, C); None: there is none.
    """

    stores_views = True

    def __init__(
        self,
        weights: TokenWeights,
        injection: Tensor,
        keys: Tensor,
        values: Tensor,
        relative: Tensor | None,
        rotation: Rotation | None,
        bias: Tensor,
        residual: Tensor | None,
    ) -> None:
        self.weights, self.injection = weights, injection
        self.keys, self.values, self.relative, self.bias = keys, values, relative, bias
        self.rotation, self.residual = rotation, residual
        if self.stores_views:
            self.views = self._own_views()

    def __call__(self, z: Tensor) -> Tensor:
        weights, layer = self.weights, self.weights.layer
        own_key, own_value, flat_keys, flat_values = self.views if self.stores_views else self._own_views()
        heads, head_dim = layer.heads, layer.head_dim
        rows = z.reshape(-1, z.shape[-1])  # (B, C)
        n = rows.shape[0]
        qkv = torch.addmm(self.injection, layer.normed(rows), weights.qkv)
        if self.rotation is not None:
            turned = self.rotation(qkv[:, : 2 * layer.inner])
            qkv = torch.cat([turned, qkv[:, 2 * layer.inner :]], 1)
        query, key, value = qkv.view(n, 3, heads, head_dim).transpose(0, 2).unbind(1)  # (H, B, D)
        own_key.copy_(key)
        own_value.copy_(value)
        query = query.contiguous()
        if self.relative is None:
            scores = self.bias.expand(heads, n, -1).reshape(heads * n, 1, -1)
        else:
            scores = torch.baddbmm(self.bias, query, self.relative).view(heads * n, 1, -1)
        # Not in place: autocast skips products in place, and the buffers have the dtype of the weights.
        scores = torch.baddbmm(scores, query.view(heads * n, 1, head_dim), flat_keys)
        attended = torch.bmm(scores.softmax(-1), flat_values)  # (H*B, 1, D)
        attended = attended.view(heads, n, head_dim).transpose(0, 1).reshape(n, -1)
        stream = torch.addmm(layer.out_bias, attended, weights.out).add_(rows)
        h, normed = layer.before_ffn(stream if self.residual is None else stream.add_(self.residual))
        inner = layer.activation(torch.addmm(layer.ffn_in_bias, normed, weights.ffn_in))
        out = torch.addmm(layer.ffn_out_bias, inner, weights.ffn_out).add_(h)
        return layer.closed(out).view_as(z)

    def _own_views(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last column of keys and values, (H, B, D) each, and all of them, (H*B, ...)."""
        keys, values = self.keys, self.values
        return keys[..., -1], values[:, :, -1], keys.flatten(0, 1), values.flatten(0, 1)

    def restrict(self, z: Tensor, positions: Tensor, value: Tensor | None = None) -> TokenTransformer:
        """f of the texts `positions` (n,) alone, (n, C) -> (n, C); no text sees another one."""
        return TokenTransformer(
            weights=self.weights,
            injection=self.injection.index_select(0, positions),
            keys=self.keys.index_select(1, positions),
            values=self.values.index_select(1, positions),
            relative=self.relative,
            rotation=self.rotation,
            bias=self.bias if self.bias.shape[1] == 1 else self.bias.index_select(1, positions),
            residual=None if self.residual is None else self.residual.index_select(0, positions),
        )


class RecordableToken(TokenTransformer):
    """The same for solves that are recorded: it stores no views, so that a copy with other keys is whole."""

    holds_its_tensors = True
    stores_views = False
