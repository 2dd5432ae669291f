"""Anderson's method with identical iterations, for solves on a GPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .config import SolverConfig
from .fused import fused
from .least_squares import NO_PIVOT, compiled_least_squares, ridge_table, stacked_least_squares
from .registry import Precondition
from .rows import select_rows, to_rows

# A compiler writes the elimination out, for at most so many unknowns: code grows with their cube.
_MOST_UNKNOWNS = 8


class StackedAnderson:
    """The method of `Anderson`, with its history in one tensor, so that an iteration takes few launches.

    The inner products are taken anew in each iteration, in two batched products. Differences that were not
    taken yet are zero, and have no weight. From the second iteration on, all are the same operations.
    """

    default_memory = 5
    alike = True

    def __init__(self, config: SolverConfig, like: Tensor, books: Tensor) -> None:
        slots = (config.memory or self.default_memory) - 1
        lanes, width = like.shape
        self.has_ridge = config.ridge > NO_PIVOT
        self.history = like.new_zeros(lanes, slots, 2, width)  # [DZ_j, DG_j]
        self.last: Tensor | None = None  # [z, g] of the last iteration, (n, 2, D)
        self.pair: Tensor | None = None  # [z, g] of this one, between `observe` and `step`
        numbers = torch.arange(slots, device=like.device)
        self.ridges = ridge_table(config, numbers.to(books.dtype))
        self.slot = torch.zeros_like(numbers[:1])  # of the next difference, the oldest one
        self.after = (numbers + 1) % slots  # the slot after each

    def observe(
        self, z: Tensor, g: Tensor, restarted: Tensor | None, precondition: Precondition
    ) -> list[Tensor]:
        """Put the newest differences in the oldest slot; <DG_i, DG_j> for all i and j, then <DG_j, g>."""
        self.pair = torch.stack([z, g], 1)
        if self.last is None:
            return []
        self.history.index_copy_(1, self.slot, (self.pair - self.last).unsqueeze(1))
        if restarted is not None:
            self.history.masked_fill_(restarted.view(-1, 1, 1, 1), 0)
        dg = self.history[:, :, 1]  # (n, slots, D)
        gram, rhs = torch.bmm(dg, dg.mT), torch.bmm(dg, g.unsqueeze(2))
        return [*gram.permute(1, 2, 0).flatten(0, 1), *rhs.squeeze(2).T]

    def step(
        self, products: Tensor, z: Tensor, g: Tensor, tau: Tensor | None, precondition: Precondition
    ) -> Tensor:
        left, following = g, z
        if len(products):
            ridges = self.ridges.index_select(0, self.slot)[0]
            weights = _fused_weights if len(ridges) <= _MOST_UNKNOWNS else _weights
            gamma = weights(products, ridges, self.has_ridge, z)
            assert self.pair is not None
            mixed = torch.baddbmm(self.pair.flatten(1).unsqueeze(1), gamma, self.history.flatten(2), alpha=-1)
            following, left = mixed.view_as(self.pair).unbind(1)
            self.slot = self.after.index_select(0, self.slot)
        self.last, self.pair = self.pair, None
        left = precondition(left)
        return following + left if tau is None else torch.addcmul(following, left, to_rows(tau, z))

    def skip(self) -> None:
        self.slot, self.pair = self.after.index_select(0, self.slot), None

    def subset(self, source: Tensor) -> StackedAnderson:
        part = copy.copy(self)
        part.history = select_rows(self.history, source)
        part.last = None if self.last is None else select_rows(self.last, source)
        part.pair = None if self.pair is None else select_rows(self.pair, source)
        return part

    def inverse_transpose(self, vector: Tensor, precondition: Precondition) -> Tensor:
        """P^T v - DG (DG^T DG)^{-1} (DG^T P^T v + DZ^T v): the transpose of g -> the step, whose tau is 1."""
        estimate = precondition(vector)
        dz, dg = self.history.unbind(2)  # (n, slots, D) each
        gram = torch.bmm(dg, dg.mT).permute(1, 2, 0).to(self.ridges.dtype)
        along = torch.bmm(dg, estimate.unsqueeze(2)) + torch.bmm(dz, vector.unsqueeze(2))
        ridges = self.ridges.diagonal()
        gamma = stacked_least_squares(gram, along.squeeze(2).T.to(gram.dtype), ridges, self.has_ridge)
        return torch.baddbmm(estimate.unsqueeze(1), _as_factors(gamma, vector), dg, alpha=-1).squeeze(1)


def _weights(products: Tensor, ridges: Tensor, has_ridge: bool, like: Tensor) -> Tensor:
    """gamma = argmin |g - DG*gamma|, (n, 1, slots), in the type of `like`.

    Args:
        products: <DG_i, DG_j> and then <DG_j, g>, (slots^2 + slots, n).
        ridges, has_ridge: as for `stacked_least_squares`.
        like: any tensor of that type.
    """
    slots = len(ridges)
    gram, rhs = products[:-slots].unflatten(0, (slots, slots)), products[-slots:]
    if torch.compiler.is_compiling():
        return _as_factors(compiled_least_squares(gram, rhs, ridges), like)
    return _as_factors(stacked_least_squares(gram, rhs, ridges, has_ridge), like)


_fused_weights = fused(_weights)


def _as_factors(gamma: Tensor, like: Tensor) -> Tensor:
    return gamma.T.unsqueeze(1).to(like.dtype)
