"""Is it an equilibrium? Several starts, changed tokens, other batch mates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...solvers import solve
from .subject import Layer, Subject

_STARTS = 3
# The starts are solved to a tenth of the tolerance, in four times the budget.
_FINER, _LONGER = 0.1, 4
# States that differ by more than this share of their length are different states.
_APART = 0.05


@dataclass(frozen=True)
class Starts:
    """Solves of the same block from random states.

    Attributes:
        converged: share of positions that converged, for each start.
        distances: of each position, the largest distance to the model's own state, relative to it, sorted;
            of positions that converged from everywhere.
        apart: share of these that came to another state.
        remark: how the starts differ from the model's own solves, if they do.
    """

    converged: list[float]
    distances: list[float]
    apart: float
    remark: str


@dataclass(frozen=True)
class Invariances:
    """What must not change a state.

    Attributes:
        causal: whether changing a token leaves the states before it as they were, to the last bit.
        causal_change: the largest change there.
        batch_invariant: whether a row alone has the states that it has in its batch, to the last bit.
        batch_change: the largest difference, relative to the largest number.
    """

    causal: bool
    causal_change: float
    batch_invariant: bool
    batch_change: float


@torch.no_grad()
def random_starts(layer: Layer) -> Starts:
    """Solve from random states of the equilibrium's size.

    Args:
        layer: the layer at a block of text.
    """
    remark, known, scope = "", layer.preconditioner, layer.solver.scope
    if scope == "recurrence":  # which starts each position itself
        remark = "solved position by position side by side, since a recurrence chooses its own starts"
        known, scope = None, "position"
    config = replace(
        layer.solver,
        scope=scope,
        rtol=layer.solver.rtol * _FINER,
        atol=layer.solver.atol * _FINER,
        max_evals=layer.solver.max_evals * _LONGER,
        policy="best",
    )
    own = solve(layer.f, layer.state, config, known)
    scale = layer.state.flatten(0, 1).std(0)
    size = torch.linalg.vector_norm(own.state, dim=-1).clamp(min=1e-12)
    largest, everywhere = torch.zeros_like(size), _by_position(own.converged, size)
    converged = []
    for seed in range(_STARTS):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(layer.state.shape, generator=generator).to(layer.state)
        found = solve(layer.f, noise * scale, config, known)
        converged.append(float(found.converged.float().mean()))
        everywhere = everywhere & _by_position(found.converged, size)
        distance = torch.linalg.vector_norm(found.state - own.state, dim=-1) / size
        largest = torch.maximum(largest, distance)
    met = largest[everywhere]
    apart = float((met > _APART).float().mean()) if len(met) else 0.0
    return Starts(converged, met.sort().values.tolist(), apart, remark)


def _by_position(lanes: Tensor, like: Tensor) -> Tensor:
    return lanes if lanes.shape == like.shape else lanes.view(-1, 1).expand_as(like)


@torch.no_grad()
def check_invariances(subject: Subject, layer: Layer) -> Invariances:
    """Change the token in the middle, and take a row out of its batch.

    Args:
        subject: the model.
        layer: the layer at a block of text.
    """
    tokens, middle = layer.tokens, layer.tokens.shape[1] // 2
    before = _features(subject, layer)
    changed = tokens.clone()
    word = int(tokens[0, 0])
    changed[:, middle] = torch.where(tokens[:, middle] == word, subject.dictionary.unk(), word)
    after = _features(subject, replace(layer, tokens=changed))
    change = (after - before)[:, :middle]
    alone = _features(subject, layer.rows(1, subject))
    difference = alone - before[:1]
    return Invariances(
        causal=not bool(change.any()),
        causal_change=_relative(change, before),
        batch_invariant=not bool(difference.any()),
        batch_change=_relative(difference, before),
    )


def _features(subject: Subject, layer: Layer) -> Tensor:
    return subject.decoder.extract_features(layer.tokens, memory=layer.memory)[0]


def _relative(change: Tensor, like: Tensor) -> float:
    return float(change.abs().max() / like.abs().max().clamp(min=1e-30)) if change.numel() else 0.0
