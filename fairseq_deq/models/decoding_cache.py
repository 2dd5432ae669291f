"""What incremental decoding keeps from one token to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers.cache import LayerCache


@dataclass(frozen=True)
class Prompt:
    """Equilibria of the prompts, all solved at the first step.

    Attributes:
        state: (B, L, C); row i is valid up to `lengths[i]`.
        lengths: tokens of each prompt, (B,).
    """

    state: Tensor
    lengths: Tensor

    def rows(self, order: Tensor) -> Prompt:
        """The prompts `order`, in that order."""
        return Prompt(self.state.index_select(0, order), self.lengths.index_select(0, order))


@dataclass(frozen=True)
class DecodingCache:
    """What incremental decoding keeps, in fairseq's `incremental_state`.

    Attributes:
        layer: the layer's cache of earlier positions; first those of the memory, then those of the tokens.
        memory: number of positions of the memory.
        injection_weight: the weight of the injection, normalised once.
        recent: the last embeddings, as many as the next injection needs besides its own.
        last: the newest equilibria, (B, 1, C).
        total, count: sum of the earlier equilibria, (B, 1, C), and their number, (B, 1, 1); without padding.
        padding: (B, S) bool, True at positions that must not be attended to; None if no text begins with one.
        prompt: equilibria of the prompts; None once all of them are settled.
        order: for each hypothesis the row of the cache that it continues; None: its own. The order is applied
            when the cache is next used, so that the steps of fairseq's search within a prompt cost nothing.
    """

    layer: LayerCache
    memory: int
    injection_weight: Tensor
    recent: Tensor
    last: Tensor
    total: Tensor
    count: Tensor
    padding: Tensor | None
    prompt: Prompt | None
    order: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the text: those of the layer's cache."""
        return self.layer.nbytes

    @property
    def seen(self) -> int:
        """Number of tokens settled."""
        return self.layer.length - self.memory

    def reordered(self, order: Tensor) -> DecodingCache:
        """Hypothesis i continues what hypothesis `order[i]` was."""
        return replace(self, order=order if self.order is None else self.order.index_select(0, order))

    def in_order(self) -> DecodingCache:
        """The same, with a row for each hypothesis, in their order."""
        order, rows = self.order, self.last.shape[0]
        if order is None or torch.equal(order, torch.arange(rows, device=order.device)):
            return replace(self, order=None)
        self.layer.reorder(order)
        return replace(
            self,
            recent=self.recent.index_select(0, order),
            last=self.last.index_select(0, order),
            total=self.total.index_select(0, order),
            count=self.count.index_select(0, order),
            padding=None if self.padding is None else self.padding.index_select(0, order),
            prompt=None if self.prompt is None else self.prompt.rows(order),
            order=None,
        )

    def known(self, position: int) -> Tensor | None:
        """Equilibria of the hypotheses at a `position` within all prompts, (B, 1, C); None beyond."""
        if self.prompt is None or position >= self.seen:
            return None
        state = self.prompt.state[:, position : position + 1]
        return state if self.order is None else state.index_select(0, self.order)

    def start(self, told: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Where to start the solve for the next position, and the rows whose equilibrium the prompt supplies.

        Where nothing has been learned, the mean of the equilibria so far is the start: from there a solve
        takes a fifth fewer evaluations than from zero, and fewer than from the last equilibrium; on a trained
        model such solves also fail, or find another equilibrium than that of the whole text, less often.

        Args:
            told: the start that the learned map predicts, (B, 1, C); None: nothing is learned.
        Returns:
            the start, (B, 1, C), and the equilibria of the prompts that reach further;
            (B, 1, 1) bool, True for these; None where no prompt does.
        """
        # The mean is zero where a row has had nothing but padding.
        mean = self.total / self.count.clamp(min=1) if told is None else told
        prompt, position = self.prompt, self.seen
        if prompt is None or position >= prompt.state.shape[1]:
            return mean, None
        inside = (prompt.lengths > position).view(-1, 1, 1)
        return torch.where(inside, prompt.state[:, position : position + 1], mean), inside

    def extended(
        self, state: Tensor, record: Tensor, injection: Tensor, recent: Tensor, padding: Tensor | None
    ) -> DecodingCache:
        """With new positions settled.

        Args:
            state: their equilibria, (B, T, C).
            record: what the layer keeps of them, (B, T, R).
            injection: their injections, (B, T, D).
            recent, padding: of the positions behind, these included.
        """
        self.layer.append(record, injection)
        prompt = self.prompt
        if prompt is not None and self.seen >= prompt.state.shape[1]:
            prompt = None
        return replace(
            self,
            recent=recent,
            last=state[:, -1:],
            total=self.total + state.sum(1, keepdim=True),
            count=self.count + state.shape[1],
            padding=padding,
            prompt=prompt,
        )
