"""What a model learns about its own solves: the mean Jacobian, where to start, and whether they converge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..equilibrium import Equilibrium, SolveStats
from ..layers.layer import Layer
from ..options import is_on
from ..solvers import Preconditioner
from .keeper import ConvergenceKeeper
from .learned import Learned, LearnedPreconditioner, LearnedStart

# The preconditioner and the start are learned once in so many updates, and in every one until they are known.
_LEARN_EVERY = 10


class Knowledge(nn.Module):
    """Learned beside the weights, in training; used by every solve of the model.

    Args:
        cfg: options of the model.
        layer: the layer f.
        scope: scope of its solves.
    """

    def __init__(self, cfg: Any, layer: Layer, scope: str) -> None:
        super().__init__()
        channels = layer.own_dim if scope == "recurrence" else layer.state_dim
        rank, unrolled = cfg.preconditioner_rank, str(cfg.gradient) == "unroll"
        # What is unrolled is a network of its own, from zero; it solves nothing.
        self.learned_preconditioner = LearnedPreconditioner(channels, rank) if rank and not unrolled else None
        starts = is_on(cfg, "learned_start") and not unrolled
        self.learned_start = LearnedStart(cfg.decoder_embed_dim, layer.state_dim) if starts else None
        keeps = cfg.keep_converged > 0 and not unrolled
        self.keeper = ConvergenceKeeper(cfg.keep_converged) if keeps else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # What another run has learned, and this one does without.
        for name in ("learned_preconditioner", "learned_start", "keeper"):
            if getattr(self, name) is None:
                for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def preconditioner(self) -> Preconditioner | None:
        """The preconditioner P of all solves; None while nothing has been learned."""
        return None if self.learned_preconditioner is None else self.learned_preconditioner.preconditioner()

    def start(self, embedded: Tensor, before: Tensor | None) -> Tensor | None:
        """The learned start of a solve, (B, T, C); None while nothing has been learned.

        Args:
            embedded: embeddings of the tokens, (B, T, D).
            before: the embedding of the token before, (B, 1, D); None: there is none.
        """
        known = self.learned_start is not None and self.learned_start.is_known
        return self.learned_start(embedded, before) if known and self.learned_start is not None else None

    def penalty_weight(self) -> float:
        """Weight of the Jacobian penalty that keeps solves converging."""
        return 0.0 if self.keeper is None else float(self.keeper.weight)

    def collect(
        self,
        update: int,
        solved: Iterable[tuple[Callable[[Tensor], Tensor], Equilibrium]],
        embedded: Tensor,
        real: Tensor,
        stats: tuple[SolveStats, SolveStats],
    ) -> None:
        """Collect what the solves of one forward pass teach, from converged positions only.

        Args:
            update: number of finished updates.
            solved: the layer and its equilibrium, for each subsequence.
            embedded: embeddings of the tokens, (B, T, D).
            real: (B, T) bool, False at padding.
            stats: of the forward and of the backward solve; filled in later.
        """
        learning = self._learning(update)
        states: list[Tensor] = []
        sounds: list[Tensor] = []
        for f, equilibrium in solved:
            state = equilibrium.state.detach()
            begin = sum(s.shape[1] for s in states)
            sound = real[:, begin : begin + state.shape[1]]
            if equilibrium.result is not None:
                converged = equilibrium.result.converged  # (B, T), (B,) or (1,), by the scope
                sound = sound & (converged if converged.dim() == 2 else converged.view(-1, 1))
            states.append(state)
            sounds.append(sound)
            if self.learned_preconditioner is not None and self.learned_preconditioner in learning:
                self.learned_preconditioner.collect(f, state, sound, update)
        if self.learned_start is not None and self.learned_start in learning:
            self.learned_start.collect(embedded.detach(), torch.cat(states, 1), torch.cat(sounds, 1))
        if self.keeper is not None:
            self.keeper.collect(*stats)

    def renew(self, update: int) -> None:
        """Apply what the update after `update` finished ones has collected; every worker must call this."""
        for learned in self._learning(update):
            learned.renew()

    def _learning(self, update: int) -> list[Learned]:
        """What learns in the update after `update` finished ones: the same on every worker."""
        modules: list[Learned | None] = [self.keeper]
        for module in (self.learned_preconditioner, self.learned_start):
            if update % _LEARN_EVERY == 0 or (module is not None and not module.is_known):
                modules.append(module)
        return [module for module in modules if module is not None]
