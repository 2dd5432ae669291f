"""Decoding token by token: whole prompts at once, then one solve for each new position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..equilibrium import Equilibrium, SolveStats
from ..layers.layer import recorded
from ..layers.memory import Memory
from ..solve_report import report_solves
from ..solvers import solve_few
from .decoding_cache import DecodingCache, Prompt
from .extra import DecoderExtra, decoder_extra
from .segment_decoder import SegmentDecoder


class IncrementalDecoder:
    """Equilibria of the newest tokens, given the cache of the earlier ones.

    Decoding starts with one solve for all prompts. Each new token is then solved by itself, given one cached
    layer of settled positions, however many evaluations that solve takes.

    Args:
        decoder: the decoder of whole segments, in evaluation mode.
    """

    def __init__(self, decoder: SegmentDecoder) -> None:
        self.decoder = decoder

    def begin(self, tokens: Tensor, memory: Memory | None) -> tuple[DecodingCache, DecoderExtra]:
        """Solve for the first tokens of every text, all at once.

        Args:
            tokens: (B, L); those of shorter prompts are padded on the right, or on the left.
            memory: the memory of the text before the prompts.
        Returns:
            the cache, in which the positions that all prompts have are settled, and the result of the solve.
        """
        decoder = self.decoder
        before = memory.length if memory is not None else 0
        padding = decoder.padding(tokens, before)
        solved = decoder.solve_segment(tokens, memory, padding)
        layer = solved.prepared.new_cache(tokens.shape[0])
        if memory is not None and before:
            layer.append(memory.state, memory.injection)
        real = tokens.ne(decoder.padding_idx)
        lengths = (real * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1)
        common = int(lengths.min())
        layer.append(solved.record[:, :common], solved.injection[:, :common])
        state, real = solved.state, real[:, :common].unsqueeze(-1)
        recent = solved.embedded[:, :common]
        if memory is not None and decoder.injection.window > 1:
            recent = torch.cat([memory.injection, recent], 1)
        cache = DecodingCache(
            layer,
            before,
            injection_weight=decoder.injection.normalized_weight(),
            recent=self._recent(recent),
            last=state[:, common - 1 : common],
            total=(state[:, :common] * real).sum(1, keepdim=True),
            count=real.sum(1, keepdim=True),
            padding=None if padding is None else padding[:, : before + common],
            prompt=Prompt(state, lengths),
        )
        return cache, solved.extra

    def advance(self, cache: DecodingCache, tokens: Tensor) -> tuple[DecodingCache, DecoderExtra]:
        """Solve for the tokens that are not settled yet, given those that are.

        Args:
            cache: the cache of the earlier tokens, with one row per text, in order.
            tokens: all tokens so far, (B, T).
        """
        decoder = self.decoder
        new = tokens[:, cache.seen :]
        padding = cache.padding
        if padding is not None:
            padding = torch.cat([padding, new.eq(decoder.padding_idx)], 1)
        embedded = decoder.embed(new)
        injection = decoder.inject(embedded, cache.recent, cache.injection_weight)
        f = cache.layer.bind(injection, padding)
        stats = SolveStats.empty(tokens.device), SolveStats.empty(tokens.device)
        real = new.ne(decoder.padding_idx)
        start = decoder.start(embedded, injection, cache.recent[:, -1:])
        if new.shape[1] > 1:
            z0 = injection.new_zeros(*new.shape, decoder.layer.state_dim) if start is None else start
            equilibrium = decoder.find_equilibrium(f, z0, stats)
        else:
            z0, known = cache.start(start)
            result = solve_few(f, z0, decoder.solve_options(z0)[0], decoder.knowledge.preconditioner())
            real = real if known is None else real & ~known.squeeze(-1)
            stats[0].at(real).record(result)
            state = result.state if known is None else torch.where(known, z0, result.state)
            equilibrium = Equilibrium(state, result, *stats)
        report_solves([equilibrium], real)
        recent = self._recent(torch.cat([cache.recent, embedded], 1))
        state = equilibrium.state
        cache = cache.extended(state, recorded(f, state), injection, recent, padding)
        return cache, decoder_extra([equilibrium], stats)

    def _recent(self, embedded: Tensor) -> Tensor:
        """The last embeddings, as many as the next injection and its start are made of beside its own."""
        return embedded[:, max(0, embedded.shape[1] - max(self.decoder.injection.window - 1, 1)) :]
