"""f of several layers, one after another, solved as one equilibrium.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .transformer_deq import BoundTransformer, KeysValues, TransformerLayer


@dataclass(frozen=True)
class StackPast:
    """What each layer keeps of the positions before a segment."""

    parts: tuple[KeysValues, ...]

    def reordered(self, order: Tensor) -> StackPast:
        """The texts with these indices, (B',), in that order."""
        return StackPast(tuple(part.reordered(order) for part in self.parts))


class Stack(nn.Module):
    """f(z; u) = f_N(... f_1(z; u_1) ...; u_N), u = [u_1, ..., u_N]; each f_i is a `TransformerLayer`.

    Args:
        layers: f_1 to f_N.
    """

    def __init__(self, layers: list[TransformerLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.state_dim = layers[0].state_dim
        self.injection_dims = [layer.injection_dim for layer in layers]

    @property
    def injection_dim(self) -> int:
        """Channels of the injection u."""
        return sum(self.injection_dims)

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax reads: the states."""
        return state

    def beginning(self, batch: int, like: Tensor) -> StackPast:
        """The past at the beginning of a text: no positions."""
        return StackPast(tuple(layer.beginning(batch, like) for layer in self.layers))  # type: ignore[operator]

    def bind(self, u: Tensor, past: StackPast, lengths: Tensor) -> BoundStack:
        """f over the positions that follow; arguments as for `TransformerLayer.bind`."""
        injections = u.split(self.injection_dims, -1)
        bound = [
            layer.bind(own, part, lengths)  # type: ignore[operator]
            for layer, own, part in zip(self.layers, injections, past.parts)
        ]
        return BoundStack(bound)


class BoundStack:
    """z -> f(z) over (B, T, C).

    It has no method `part`, which holds the states of some positions: even where z is held, f_1(z) changes
    with the positions before it, and f_2 reads f_1(z).
    """

    def __init__(self, layers: list[BoundTransformer]) -> None:
        self.layers = layers

    def __call__(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z)
        return z

    @torch.no_grad()
    def settle(self, z: Tensor, counts: Tensor) -> StackPast:
        """The past after these positions; arguments as for `BoundTransformer.settle`."""
        parts = []
        for layer in self.layers:
            parts.append(layer.settle(z, counts))
            z = layer(z) if layer is not self.layers[-1] else z
        return StackPast(tuple(parts))

    def column(self, z: Tensor, t: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Raise NotImplementedError, as a single Transformer layer does."""
        return self.layers[0].column(z, t)
