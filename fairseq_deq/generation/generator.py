"""fairseq's search, with prompts that are solved in one parallel solve."""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from ..errors import OptionError
from .text import bound_lengths


class PrefillingGenerator(SequenceGenerator):
    """fairseq's generator for models whose decoder has `prefill`.

    fairseq gives a language model the tokens of a prompt one by one. Here the first step hands over the
    whole prompt; the decoder then knows the answers to the steps within it. Hypotheses and scores are those
    of fairseq's generator, but for their length: that is each prompt's own, max_len_a * n + max_len_b tokens
    for one of n tokens (and n at least), where fairseq takes the longest prompt of the batch for all. A
    memory in `net_input` precedes the prompts.

    Args:
        models: the models of the ensemble; those whose decoder has no `prefill` get their tokens one by one.
        tgt_dict: fairseq's dictionary.
        options: those of fairseq's generator.
    """

    max_len_a: float
    max_len_b: int

    def __init__(self, models: Any, tgt_dict: Any, **options: Any) -> None:
        super().__init__(PrefillingEnsemble(models, tgt_dict.eos()), tgt_dict, **options)
        bound_lengths(models)

    def _generate(
        self,
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
        bos_token: int | None = None,
    ) -> Any:
        source = sample["net_input"]["src_tokens"]
        prompt = source.new_full((source.shape[0], 1), self.eos if bos_token is None else bos_token)
        lengths = source.new_zeros(source.shape[0])
        if prefix_tokens is not None:
            prompt = torch.cat([prompt, prefix_tokens], 1)
            lengths = prefix_tokens.ne(self.pad).sum(1)
        longest = [int(self.max_len_a * n + self.max_len_b) for n in lengths.tolist()]
        if self.min_len > max(1, *longest):
            raise OptionError(
                f"--min-len {self.min_len} is more than the {max(longest)} tokens that --max-len-a and "
                "--max-len-b leave, prompts included"
            )
        limits = torch.tensor(longest, device=source.device).maximum(lengths)
        limits = limits.clamp(max(1, self.min_len), self.max_len - 1)
        net_input = {**sample["net_input"], "prompt": prompt, "limits": limits}
        asked = self.max_len_a, self.max_len_b
        # What fairseq lets the whole batch run to is the longest of them.
        self.max_len_a, self.max_len_b = 0, int(limits.max())
        try:
            return super()._generate(
                {**sample, "net_input": net_input}, prefix_tokens, constraints, bos_token
            )
        finally:
            self.max_len_a, self.max_len_b = asked

    def is_finished(
        self, step: int, unfin_idx: int, max_len: int, finalized_sent_len: int, beam_size: int
    ) -> bool:
        """Whether a prompt has its hypotheses, or has come to its own length."""
        limit = int(self.model.limits[unfin_idx * beam_size])
        return super().is_finished(step, unfin_idx, min(max_len, limit), finalized_sent_len, beam_size)


class PrefillingEnsemble(EnsembleModel):
    """Models that are handed the prompts at the first step, and end each at its own length.

    fairseq carries along what an encoder says; a language model has none, and the prompts take its place.

    Args:
        models: the ensemble.
        eos: the token that ends a text.
    """

    def __init__(self, models: Any, eos: int) -> None:
        super().__init__(models)
        self.eos = eos
        #: Tokens at which each hypothesis ends, (B * beam,), in the order of the latest step.
        self.limits = torch.zeros(0)

    def forward_encoder(self, net_input: dict[str, Any]) -> Any:
        """The prompts, the memory before them, and where they end."""
        return [{name: net_input.get(name) for name in ("prompt", "memory", "limits")}]

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> Any:
        """The same with the ends in this order; only the first step looks at the rest."""
        (handed,) = encoder_outs
        return [{**handed, "limits": handed["limits"].index_select(0, new_order)}]

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> Any:
        """Log-probabilities of the next token, (B * beam, V)."""
        (handed,) = encoder_outs
        self.limits = handed["limits"]
        if tokens.shape[1] == 1:
            prompt = handed["prompt"]
            beams = torch.arange(prompt.shape[0], device=prompt.device)
            beams = beams.repeat_interleave(tokens.shape[0] // prompt.shape[0])
            for model, state in zip(self.models, incremental_states):
                if hasattr(model.decoder, "prefill"):
                    model.decoder.prefill(prompt, state, handed["memory"])
                    model.decoder.reorder_incremental_state_scripting(state, beams)
        log_probs, attention = super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
        ended = self.limits <= tokens.shape[1] - 1
        if bool(ended.any()):
            end = log_probs[ended, self.eos]
            log_probs[ended] = -math.inf
            log_probs[ended, self.eos] = end
        return log_probs, attention


def is_prefillable(models: Any) -> bool:
    """Whether `PrefillingGenerator` has an advantage for these models."""
    return any(hasattr(getattr(model, "decoder", None), "prefill") for model in models) and all(
        hasattr(model, "decoder") and not hasattr(model, "encoder") for model in models
    )
