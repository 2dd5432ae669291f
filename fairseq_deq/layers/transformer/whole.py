"""The DEQ-Transformer layer at all positions of a segment."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...invariant_matmul import weighted
from ..dropout import apply_mask
from ..sample_rows import SampleRows
from .adjoint import TransformerAdjoint
from .equations import after_attention, attention_weights, queries_keys_values
from .restricted import RestrictedTransformer
from .segment import Segment


class BoundTransformer:
    """z -> f(z) over (B, T, C), for one segment; the equations are in the docstring of `TransformerLayer`.

    Args:
        segment: everything that does not depend on z.
    """

    direction = 1  # each position depends on itself and on earlier ones
    holds_its_tensors = True

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        injection = segment.residual_injection
        self.injection = None if injection is None else injection.flatten(0, 1)  # (B*T, C)

    def __call__(self, z: Tensor) -> Tensor:
        segment, rows = self.segment, z.reshape(-1, z.shape[-1])  # (B*T, C)
        query, keys, values = queries_keys_values(segment, rows)
        weights = apply_mask(attention_weights(segment, query, keys), segment.attention_mask)
        attended = segment.to_rows(weighted(weights, values))
        samples = SampleRows(segment.batch, segment.length)
        return after_attention(segment.weights, rows, attended, self.injection, samples).view_as(z)

    def restrict(
        self, z: Tensor, positions: Tensor, value: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """f at some positions, (n, C) -> (n, C), with all others held at z.

        Args:
            z: the state, (B, T, C).
            positions: sorted indices b*T + t, (n,).
            value: unused.
        """
        return RestrictedTransformer(self.segment, z, positions)

    def adjoint(self, z: Tensor, grad: Tensor) -> TransformerAdjoint:
        """lambda -> J^T lambda + grad, with J = df/dz at z (B, T, C)."""
        return TransformerAdjoint(self.segment, z, grad)
