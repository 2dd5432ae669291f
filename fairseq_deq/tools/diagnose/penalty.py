"""What a Jacobian penalty would do to this checkpoint: a few updates of a copy, with and without it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from ...jacobian import PenaltySchedule
from .spectra import radii_by_position
from .subject import Layer, Subject

# Updates of each copy, their step length, and the penalty's weight.
_UPDATES, _STEP, _WEIGHT = 12, 5e-4, 0.1
# Models of more parameters are not copied for this.
_MOST_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class PenaltyTrial:
    """What some updates did, by whether the penalty was on.

    Attributes:
        weight: of the penalty.
        updates: of each copy.
        radius: the largest radius after them, without and with the penalty.
        converged: share of positions that converged, likewise.
        loss: in nats, likewise.
    """

    weight: float
    updates: int
    radius: tuple[float, float]
    converged: tuple[float, float]
    loss: tuple[float, float]


def try_penalty(subject: Subject, layer: Layer) -> PenaltyTrial | None:
    """Train two copies on the layer's block, one with the penalty; None where the model is too large.

    Args:
        subject: the model, which stays as it is.
        layer: the layer at a block of text, of few rows.
    """
    if sum(p.numel() for p in subject.model.parameters()) > _MOST_PARAMETERS:
        return None
    found = [_trained(subject, layer, weight) for weight in (0.0, _WEIGHT)]
    radius, converged, loss = zip(*found)
    return PenaltyTrial(_WEIGHT, _UPDATES, radius, converged, loss)


def _trained(subject: Subject, layer: Layer, weight: float) -> tuple[float, float, float]:
    """Radius, share converged and loss of a copy after its updates with a penalty of this weight."""
    own = replace(subject, model=copy.deepcopy(subject.model))
    decoder = own.decoder
    decoder.penalty = PenaltySchedule(weight)
    decoder.num_updates = decoder.pretrain_steps + 1
    decoder.knowledge.keeper = None  # which may have a penalty of its own
    decoder.early_updates = 0
    optimizer = torch.optim.Adam([*decoder.layer.parameters(), *decoder.injection.parameters()], _STEP)
    own.model.train()
    torch.manual_seed(0)  # the masks of both copies
    for _ in range(_UPDATES):
        with torch.enable_grad():
            loss, extra = own.loss(layer)
            term = extra["jacobian_penalty"]
            (loss if term is None else loss + term.weighted).backward()
        torch.nn.utils.clip_grad_norm_(decoder.layer.parameters(), 1.0)
        optimizer.step()
        own.model.zero_grad()
    own.model.eval()
    after = own.layer_at(layer.tokens, layer.targets, layer.memory)
    _, radii = radii_by_position(after)
    with torch.no_grad():
        loss, _ = own.loss(after)
    return max(radii), float(after.result.converged.float().mean()), float(loss)
