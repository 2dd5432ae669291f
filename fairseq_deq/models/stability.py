"""Measures of the Jacobian at the equilibria: a penalty in training, spectral radii in validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..equilibrium import Equilibrium
from ..jacobian import jacobian_penalty, spectral_radius

# Positions of a row whose blocks are looked at.
_BLOCKS = 8


@dataclass(frozen=True)
class JacobianPenalty:
    """The Jacobian penalty of one forward pass.

    Attributes:
        value: its mean over the positions, a scalar with its graph.
        weight: its weight in the loss of this update.
        positions: how many positions that are not padding, a scalar.
    """

    value: Tensor
    weight: float
    positions: Tensor

    @property
    def weighted(self) -> Tensor:
        """weight * value, to be added to the mean loss of a token."""
        return self.weight * self.value

    @classmethod
    def of(cls, equilibria: list[Equilibrium], real: Tensor, weight: float) -> JacobianPenalty:
        """The penalty at the equilibria of the subsequences of a segment.

        The Jacobian is that of each subsequence in its own state; those before it are held, as in its solve.

        Args:
            equilibria: one per subsequence, each with its taped evaluation of f.
            real: (B, T) bool, False at padding.
            weight: weight in the loss.
        """
        taped = [e.taped for e in equilibria if e.taped is not None]
        parts = real.split([fz.shape[1] for fz, _ in taped], 1)
        counts = torch.stack([part.sum() for part in parts])
        values = torch.stack([jacobian_penalty(fz, z, real=part) for (fz, z), part in zip(taped, parts)])
        positions = counts.sum()
        return cls((values * counts).sum() / positions.clamp(min=1), weight, positions)


@dataclass(frozen=True)
class PositionSpectralRadii:
    """The spectral radius of the layer at the equilibria of a batch, computed when it is asked for.

    A row's radius is the largest of the blocks J_tt of all its positions, since f is causal. The blocks
    of 8 positions, spread evenly over the row, stand for them: a bound from below.

    Attributes:
        solved: f and its equilibrium (B, T', C), for each subsequence.
        real: (B, T) bool, False at padding.
        steps: Arnoldi steps for each block.
    """

    solved: list[tuple[Callable[[Tensor], Tensor], Tensor]]
    real: Tensor
    steps: int

    def largest(self) -> Tensor:
        """The largest radius of each row, (B,); 0 in a row of padding only."""
        parts = self.real.split([state.shape[1] for _, state in self.solved], 1)
        chosen = _spread(len(parts), _BLOCKS)
        radii = []
        for i in chosen:
            positions, found = _spread_in_rows(parts[i], _BLOCKS // len(chosen))
            f, state = self.solved[i]
            value = spectral_radius(f, state, steps=self.steps, positions=positions).value
            radii.append(torch.where(found.unsqueeze(1), value, 0.0))
        return torch.cat(radii, 1).amax(1)


def _spread(n: int, most: int) -> list[int]:
    """At most `most` of the first n numbers, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long().tolist()


def _spread_in_rows(real: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Positions (B, K), K <= most, evenly spread over the real ones of each row, and whether it has any."""
    counts = real.sum(1)
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)  # the real positions come first
    share = torch.linspace(0, 1, min(most, real.shape[1]), device=real.device)
    place = (share * (counts - 1).clamp(min=0).unsqueeze(1)).round().long()
    return order.gather(1, place), counts > 0
