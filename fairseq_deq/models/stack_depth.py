"""How many times the layer is applied while the model is a stack of tied layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Self

from ..options import is_on


@dataclass(frozen=True)
class StackDepth:
    """The depth of the stack, one number for all updates or one drawn for each.

    Attributes:
        layers: N, the depth in evaluation, and the mean depth in training.
        is_random: whether each update draws its depth n, uniform over 1, 2, ..., 2*N - 1.
        seed: of the draws, `--seed` of the training.
    Source: random depths: Geiping et al. (2025, arXiv 2502.05171), who draw from another distribution.
    """

    layers: int
    is_random: bool = False
    seed: int = 0

    @classmethod
    def of(cls, cfg: Any) -> Self:
        """The depth that the options of a model ask for."""
        if is_on(cfg, "pretrain_random_layers"):
            return cls(cfg.pretrain_layers, is_random=True, seed=cfg.seed)
        return cls(cfg.pretrain_layers)

    @property
    def most(self) -> int:
        """The largest depth that an update can have."""
        return 2 * self.layers - 1 if self.is_random else self.layers

    def at(self, update: int) -> int:
        """The depth of the update after `update` finished ones.

        The same on every worker and in a resumed run: it is drawn from the seed and the number of the update.
        """
        if not self.is_random:
            return self.layers
        # RandomState draws the same numbers in every version of numpy.
        return int(np.random.RandomState([self.seed, update]).randint(1, self.most + 1))
