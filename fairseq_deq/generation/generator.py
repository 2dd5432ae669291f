"""fairseq's search, where all tokens of a prompt are solved in parallel."""

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

    fairseq gives a language model the tokens of a prompt one by one. Here the first step gives the decoder
    the whole prompt, so that it knows the results of the following steps within the prompt. A memory in
    `net_input` precedes the prompts.

    Hypotheses and scores are those of fairseq's generator, except for their length. A prompt of n tokens has
    its own limit, max_len_a * n + max_len_b tokens, but at least n. fairseq computes one limit for the whole
    batch, from its longest prompt.

    Args:
        models: the models of the ensemble; those whose decoder has no `prefill` get their tokens one by one.
        tgt_dict: fairseq's dictionary.
        options: those of fairseq's generator.
    Raises:
        OptionError: while generating: `--min-len` exceeds the limit of every prompt.
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
        # fairseq's own limit for the batch becomes the largest of them.
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
        """Whether a prompt has all its hypotheses, or has reached its own limit."""
        limit = int(self.model.limits[unfin_idx * beam_size])
        return super().is_finished(step, unfin_idx, min(max_len, limit), finalized_sent_len, beam_size)


class PrefillingEnsemble(EnsembleModel):
    """An ensemble that gets the prompts at the first step, and ends each hypothesis at its own limit.

    fairseq carries the output of an encoder through the search. A language model has no encoder, and the
    prompts take the place of its output.

    Args:
        models: the ensemble.
        eos: the token that ends a text.
    """

    def __init__(self, models: Any, eos: int) -> None:
        super().__init__(models)
        self.eos = eos
        #: The limit of each hypothesis, in tokens, (B * beam,), in the order of the latest step.
        self.limits = torch.zeros(0)

    def forward_encoder(self, net_input: dict[str, Any]) -> Any:
        """The prompts, the memory before them, and their limits."""
        return [{name: net_input.get(name) for name in ("prompt", "memory", "limits")}]

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> Any:
        """The same, with limits in the new order; only the first step reads the prompts and the memory."""
        (handed,) = encoder_outs
        return [{**handed, "limits": handed["limits"].index_select(0, new_order)}]

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> Any:
        """Log-probabilities of the next token, (B * beam, V), and fairseq's attention weights."""
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
    """Whether all models are language models and at least one has a decoder with `prefill`."""
    return any(hasattr(getattr(model, "decoder", None), "prefill") for model in models) and all(
        hasattr(model, "decoder") and not hasattr(model, "encoder") for model in models
    )
