"""Limited-memory good Broyden with identical iterations, for solves on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vecdot

from .config import SolverConfig
from .registry import Precondition
from .rows import select_rows, to_rows

# Where |1 - s^T w/|s|^2| is smaller than this, the newest factor is left out of a step.
LEAST_DENOMINATOR = 1e-4


class StackedBroyden:
    """The method of `Broyden`, with all steps in one tensor, and as many launches however many there are.

    c_j = <s_j, w before factor j> / |s_j|^2 are the solution of a triangular system: for j = 0, 1, ...,
    c_j - sum_{i<j} c_i <s_{i+1}, s_j> / |s_j|^2 = <s_j, tau*P g> / |s_j|^2. Slots that have no step yet are
    zero, and so are their c_j. Each lane has `memory` slots, or as many as the budget of the solve.
    """

    default_memory = 32
    alike = True

    def __init__(self, config: SolverConfig, like: Tensor, books: Tensor) -> None:
        slots = min(config.memory or self.default_memory, config.max_evals)
        lanes, width = like.shape
        self.rest = torch.zeros_like(like)
        self.last = self.rest  # the newest step, (n, D)
        self.steps = like.new_zeros(lanes, slots, width)
        self.inner = books.new_zeros(lanes, slots, slots)  # <s_i, s_j>, zero until both are known
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)  # of the next step
        self.numbers = torch.arange(slots, device=like.device)
        self.proposal: Tensor | None = None  # P g, between `observe` and `step`

    def observe(
        self, z: Tensor, g: Tensor, restarted: Tensor | None, precondition: Precondition
    ) -> list[Tensor]:
        """<s_j, s_new> for the step of each slot, then <s_j, P g>."""
        self._forget(restarted)
        self.proposal = precondition(g)
        both = torch.stack([self.last, self.proposal], 2)  # (n, D, 2)
        return [*torch.bmm(self.steps, both).permute(2, 1, 0).flatten(0, 1)]

    def step(
        self, products: Tensor, z: Tensor, g: Tensor, tau: Tensor | None, precondition: Precondition
    ) -> Tensor:
        assert self.proposal is not None
        move = self.proposal if tau is None else self.proposal * to_rows(tau, z)
        of_last, along = products.unflatten(0, (2, -1)).transpose(1, 2)  # (n, slots) each
        newest = self.numbers == self.slot - 1  # none before the first step
        self.inner = torch.where(newest, of_last.unsqueeze(2), self.inner)
        self.inner = torch.where(newest.unsqueeze(1), of_last.unsqueeze(1), self.inner)
        move = self._newton_step(move, along if tau is None else along * tau.unsqueeze(1), newest)
        self.steps.index_copy_(1, self.slot, move.unsqueeze(1))
        self.last, self.proposal, self.slot = move, None, self.slot + 1
        return z + move

    def skip(self) -> None:
        self._forget(None)
        self.steps.index_fill_(1, self.slot, 0)
        self.last, self.proposal, self.slot = self.rest, None, self.slot + 1

    def subset(self, source: Tensor) -> StackedBroyden:
        part = copy.copy(self)
        part.rest, part.last = select_rows(self.rest, source), select_rows(self.last, source)
        part.proposal = None if self.proposal is None else select_rows(self.proposal, source)
        part.steps, part.inner = select_rows(self.steps, source), select_rows(self.inner, source)
        return part

    def inverse_transpose(self, vector: Tensor, precondition: Precondition) -> Tensor:
        """As that of `Broyden`; a slot without a step changes nothing."""
        return precondition(transposed_factors(self.steps.unbind(1), vector))

    def _forget(self, restarted: Tensor | None) -> None:
        """Forget the history of the lanes that restart, and of all lanes once every slot has a step."""
        full = self.slot == len(self.numbers)  # (1,)
        lanes = full if restarted is None else restarted | full
        self.steps.masked_fill_(lanes.view(-1, 1, 1), 0)
        self.inner = self.inner.masked_fill(lanes.view(-1, 1, 1), 0)
        self.last = self.last.masked_fill(lanes.unsqueeze(1), 0)
        self.slot = self.slot * ~full

    def _newton_step(self, proposal: Tensor, along: Tensor, newest: Tensor) -> Tensor:
        """-B_k^{-1} g from the stored steps; a row whose steps are zero gives the proposal itself.

        Args:
            proposal: tau*P g, (n, D).
            along: <s_j, proposal>, (n, slots).
            newest: (slots,) bool, the slot of the newest step.
        """
        square = self.inner.diagonal(dim1=1, dim2=2)  # (n, slots)
        known = square > 0
        scale = known / torch.where(known, square, 1)
        # Row j, column i: -<s_j, s_{i+1}> / |s_j|^2. The solver reads what is below the diagonal.
        factors = self.inner.roll(-1, 2) * -scale.unsqueeze(2)
        coefficients = torch.linalg.solve_triangular(
            factors, (along * scale).unsqueeze(2), upper=False, unitriangular=True
        )  # (n, slots, 1)
        last = (coefficients.squeeze(2) * newest).sum(1)
        # w = proposal + sum_j c_j s_{j+1}; the step after the newest one is zero.
        weights = coefficients[:, :-1].mT.to(proposal.dtype)
        w = torch.baddbmm(proposal.unsqueeze(1), weights, self.steps[:, 1:]).squeeze(1)
        denominator = 1 - last
        safe = denominator.abs() > LEAST_DENOMINATOR
        return w / to_rows(torch.where(safe, denominator, 1), proposal)


def transposed_factors(steps: Sequence[Tensor], vector: Tensor) -> Tensor:
    """prod_j (I + s_j s_{j+1}^T/|s_j|^2) `vector`, newest factor first; steps (n, D), the oldest first."""
    for step, following in zip(steps[-2::-1], steps[:0:-1]):
        square, along = vecdot(step, step), vecdot(following, vector)
        weight = torch.where(square > 0, along / square, torch.zeros_like(along))
        vector = torch.addcmul(vector, step, weight.unsqueeze(1))
    return vector
