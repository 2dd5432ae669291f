"""f of several layers: one after another, solved as one equilibrium."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adjoint import HasAdjoint
from ..solvers import direction_of
from .cache import LayerCache
from .layer import Layer, Map, PreparedLayer, recorded
from .weight_norm import Initializer


def compose(layers: Sequence[Layer]) -> Layer:
    """The one layer, or the `Composition` of several."""
    return layers[0] if len(layers) == 1 else Composition(layers)


class Composition(Layer):
    """f(z; u) = f_N(... f_2(f_1(z; u_1); u_2) ...; u_N), u = [u_1, ..., u_N], solved for z = f(z; u).

    Later positions need the input of each layer: z, f_1(z), and so on. So memory and cache keep N states of
    each position (see `recorded`). There is no `restrict`, which evaluates f at some positions while the
    states of the others are held: where z is held, f_1(z) still changes with the positions before it, and f_2
    reads f_1(z).

    Args:
        layers: f_1 to f_N; each has its own weights, and all have the same `state_dim`.
    Raises:
        ValueError: there is no layer, or their `state_dim` differ.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        widths = [layer.state_dim for layer in layers]
        if not widths:
            raise ValueError("f needs at least one layer, got none")
        if len(set(widths)) > 1:
            raise ValueError(f"layers of one f must have the same state_dim, got {widths}")
        super().__init__(layers[0].state_dim, sum(layer.injection_dim for layer in layers))
        self.output_dim = layers[-1].output_dim
        self.record_dim = sum(layer.record_dim for layer in layers)
        self.layers = nn.ModuleList(layers)

    @property
    def parts(self) -> list[Layer]:
        """f_1 to f_N."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def initialize(self, initializer: Initializer) -> None:
        """Draw the weights of every layer from `initializer`."""
        for layer in self.parts:
            layer.initialize(initializer)

    def output(self, state: Tensor) -> Tensor:
        """The features that the softmax reads, (B, T, output_dim): those of the last layer."""
        return self.parts[-1].output(state)

    def memory_length(self, mem_len: int) -> int:
        """Number of positions to keep: that of the layer that looks back furthest."""
        return max(layer.memory_length(mem_len) for layer in self.parts)

    def draw(self, batch: int, length: int, memory: int, like: Tensor) -> list[Any]:
        """The dropout masks of every layer; arguments as for `Layer.draw`."""
        return [layer.draw(batch, length, memory, like) for layer in self.parts]

    def prepare(self, masks: list[Any]) -> PreparedComposition:
        """The layers with the weights of one forward pass and these masks."""
        return PreparedComposition(self, [layer.prepare(mask) for layer, mask in zip(self.parts, masks)])


@dataclass(frozen=True)
class CompositionContext:
    """The contexts of all layers, in order."""

    parts: tuple[Any, ...]

    def rows(self, index: Tensor) -> CompositionContext:
        """The samples with these indices, (B',), in that order."""
        return CompositionContext(tuple(part.rows(index) for part in self.parts))


class PreparedComposition(PreparedLayer):
    """The layers with the weights of one forward pass.

    Args:
        layer: the composition.
        parts: its layers, prepared.
    """

    def __init__(self, layer: Composition, parts: list[PreparedLayer]) -> None:
        self.parts = parts
        self.record_dims = [part.record_dim for part in layer.parts]
        self.injection_dims = [part.injection_dim for part in layer.parts]

    def context(
        self, record: Tensor, injection: Tensor, context: CompositionContext | None
    ) -> CompositionContext:
        records, injections = record.split(self.record_dims, -1), injection.split(self.injection_dims, -1)
        contexts = zip(self.parts, records, injections, self._parts_of(context))
        return CompositionContext(tuple(part.context(r, u, before) for part, r, u, before in contexts))

    def bind(
        self,
        injection: Tensor,
        context: CompositionContext | None,
        padding: Tensor | None = None,
        start: int = 0,
    ) -> BoundComposition:
        parts = zip(self.parts, injection.split(self.injection_dims, -1), self._parts_of(context))
        return bound([part.bind(u, before, padding, start) for part, u, before in parts])

    def new_cache(self, batch: int) -> CompositionCache:
        caches = [part.new_cache(batch) for part in self.parts]
        return CompositionCache(caches, self.record_dims, self.injection_dims)

    def _parts_of(self, context: CompositionContext | None) -> tuple[Any, ...]:
        return (None,) * len(self.parts) if context is None else context.parts


def bound(parts: Sequence[Map]) -> BoundComposition:
    """z -> f_N(... f_1(z)), with a method `adjoint` if each of the maps has one."""
    every = all(isinstance(part, HasAdjoint) for part in parts)
    return CompositionWithAdjoint(parts) if every else BoundComposition(parts)


def _direction(parts: Sequence[Map]) -> int:
    """The `direction` that all maps share; 0 if they differ."""
    directions = {direction_of(part) for part in parts}
    return directions.pop() if len(directions) == 1 else 0


def _hold_their_tensors(parts: Sequence[Map]) -> bool:
    return all(getattr(part, "holds_its_tensors", False) for part in parts)


class BoundComposition:
    """z -> f(z) over (B, T, C), for one segment.

    Args:
        parts: f_1 to f_N.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.direction = list(parts), _direction(parts)
        self.holds_its_tensors = _hold_their_tensors(parts)

    def __call__(self, z: Tensor) -> Tensor:
        for part in self.parts:
            z = part(z)
        return z

    def record(self, z: Tensor) -> Tensor:
        """The records of all layers, side by side, (B, T, R): each layer's at its own input."""
        records = []
        for i, part in enumerate(self.parts):
            records.append(recorded(part, z))
            if i + 1 < len(self.parts):
                z = part(z)
        return torch.cat(records, -1)


class CompositionWithAdjoint(BoundComposition):
    """A `BoundComposition` of maps that each have an `adjoint`."""

    def adjoint(self, z: Tensor, grad: Tensor) -> CompositionAdjoint:
        """lambda -> J^T lambda + grad, with J = J_N ... J_1 at z; z and grad are (B, T, C)."""
        adjoints, zero = [], torch.zeros_like(grad)
        with torch.no_grad():
            for i, part in enumerate(self.parts):
                adjoints.append(part.adjoint(z, zero if i else grad))
                if i + 1 < len(self.parts):
                    z = part(z)
        return CompositionAdjoint(adjoints)


class CompositionAdjoint:
    """lambda -> J_1^T ... J_N^T lambda + grad, with J_i the Jacobian of f_i at its own input.

    Args:
        parts: the adjoint maps of f_1 to f_N; `grad` is added by the first alone, which is applied last.
    """

    def __init__(self, parts: Sequence[Map]) -> None:
        self.parts, self.direction = list(parts), _direction(parts)
        self.holds_its_tensors = _hold_their_tensors(parts)

    def __call__(self, adjoint: Tensor) -> Tensor:
        for part in reversed(self.parts):
            adjoint = part(adjoint)
        return adjoint


class CompositionCache:
    """`LayerCache` of several layers: the caches of all of them.

    Args:
        parts: the caches of f_1 to f_N.
        record_dims, injection_dims: channels of each layer's record and injection.
    """

    def __init__(self, parts: list[LayerCache], record_dims: list[int], injection_dims: list[int]) -> None:
        self.parts, self.record_dims, self.injection_dims = parts, record_dims, injection_dims

    @property
    def length(self) -> int:
        return self.parts[0].length

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def bind(self, injection: Tensor, padding: Tensor | None) -> BoundComposition:
        parts = zip(self.parts, injection.split(self.injection_dims, -1))
        return bound([part.bind(u, padding) for part, u in parts])

    def append(self, record: Tensor, injection: Tensor) -> None:
        records, injections = record.split(self.record_dims, -1), injection.split(self.injection_dims, -1)
        for part, r, u in zip(self.parts, records, injections):
            part.append(r, u)

    def reorder(self, order: Tensor) -> None:
        for part in self.parts:
            part.reorder(order)
