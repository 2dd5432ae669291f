"""A fairseq decoder whose only layer is solved to its equilibrium."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..equilibrium import SolveStats
from ..layers.dropout import apply_mask, variational_mask
from ..layers.memory import Memory, MemoryCarrier
from .decoding_cache import DecodingCache
from .extra import DecoderExtra, decoder_extra
from .incremental import IncrementalDecoder
from .segment_decoder import SegmentDecoder


class DEQDecoder(SegmentDecoder):
    """Solves for the equilibria of the tokens, and scores the next token at each position.

    Whole segments are solved for in parallel; with fairseq's `incremental_state` one token after another.
    Arguments as for `SegmentDecoder`.
    """

    # ------------------------------------------------------------------ fairseq's interface

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        src_lengths: Tensor | None = None,
        memory: Memory | MemoryCarrier | None = None,
    ) -> tuple[Tensor, DecoderExtra]:
        """Score the next token at every position.

        Args:
            prev_output_tokens: tokens, (B, T); with `incremental_state` all tokens so far.
            encoder_out: unused; part of fairseq's interface.
            incremental_state: where decoding keeps its cache.
            features_only: leave the softmax out.
            src_lengths: unused; part of fairseq's interface.
            memory: the memory of the previous segment; or its carrier, which then gets the new memory too.
        Returns:
            logits (B, T, V), or features (B, T, C) for the adaptive softmax; and the `DecoderExtra`.
        """
        x, extra = self.extract_features(prev_output_tokens, encoder_out, incremental_state, memory=memory)
        return (x if features_only else self.output_layer(x)), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict[str, Any] | None = None,
        src_lengths: Tensor | None = None,
        memory: Memory | MemoryCarrier | None = None,
    ) -> tuple[Tensor, DecoderExtra]:
        """The equilibria, (B, T, C), ready for the softmax; arguments and extra as in `forward`."""
        carrier: MemoryCarrier | None = None
        if isinstance(memory, MemoryCarrier):
            carrier, memory = memory, memory.before(prev_output_tokens.device, self)
        if incremental_state is not None:
            return self._decode(prev_output_tokens, incremental_state, memory)
        padding = self.padding(prev_output_tokens, memory.length if memory is not None else 0)
        solved = self.solve_segment(prev_output_tokens, memory, padding)
        if carrier is not None:
            carrier.leave(solved.extra["memory"], self)
        x = self.layer.output(solved.state)
        mask = variational_mask(x, (x.shape[0], 1, x.shape[2]), self.dropout, self.training)
        return apply_mask(x, mask), solved.extra

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits (B, T, V) of the full softmax; the features themselves where the softmax is adaptive."""
        if self.adaptive_softmax is not None:
            return features
        if self.output_projection is not None:
            return self.output_projection(features)
        assert isinstance(self.embed_tokens, nn.Embedding)
        return F.linear(features, self.embed_tokens.weight)

    def max_positions(self) -> int:
        """Positions are relative: there is no longest input."""
        return int(1e6)

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Follow fairseq's beams: row i of the cache becomes row `new_order[i]` of the old one."""
        cache = self.decoding_cache(incremental_state)
        if cache is not None:
            self.set_incremental_state(incremental_state, "cache", cache.reordered(new_order))

    # ------------------------------------------------------------------ incremental decoding

    def decoding_cache(self, incremental_state: dict[str, Any]) -> DecodingCache | None:
        """What decoding has kept so far; None: nothing."""
        return self.get_incremental_state(incremental_state, "cache")

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        incremental_state: dict[str, Any],
        memory: Memory | MemoryCarrier | None = None,
    ) -> None:
        """Solve for whole prompts in one parallel solve, before decoding goes through their tokens.

        Args:
            tokens: prompts, (B, L); those that are shorter are padded on the right, or on the left.
            incremental_state: where decoding keeps its cache; nothing has been decoded in it yet.
            memory: the memory of the text before the prompts, or its carrier.
        """
        if isinstance(memory, MemoryCarrier):
            memory = memory.before(tokens.device, self)
        if not self.pretraining:
            cache, _ = IncrementalDecoder(self).begin(tokens, memory)
            self.set_incremental_state(incremental_state, "cache", cache)

    @torch.no_grad()
    def _decode(
        self, tokens: Tensor, incremental_state: dict[str, Any], memory: Memory | None
    ) -> tuple[Tensor, DecoderExtra]:
        """The features of each row's last token, (B, 1, C)."""
        if self.training:
            raise RuntimeError(
                "incremental decoding has neither dropout nor gradients; call model.eval() first"
            )
        if self.pretraining:  # every layer of a stack has keys and values of its own: there is no cache
            padding = self.padding(tokens, memory.length if memory is not None else 0)
            solved = self.solve_segment(tokens, memory, padding)
            return self.layer.output(solved.state[:, -1:]), solved.extra
        cache = self.decoding_cache(incremental_state)
        extra: DecoderExtra | None = None
        if cache is None:
            cache, extra = IncrementalDecoder(self).begin(tokens, memory)
        state = cache.known(tokens.shape[1] - 1)
        if state is None:
            cache, extra = IncrementalDecoder(self).advance(cache.in_order(), tokens)
            state = cache.last
        if extra is None:  # the prompt was solved before
            extra = decoder_extra([], (SolveStats.empty(tokens.device), SolveStats.empty(tokens.device)))
        self.set_incremental_state(incremental_state, "cache", cache)
        return self.layer.output(state).clone(), extra  # fairseq's search writes to what it gets
