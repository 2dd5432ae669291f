"""fairseq's search, with prompts that are solved in one parallel solve."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor


class PrefillingGenerator(SequenceGenerator):
    """fairseq's generator for models whose decoder has `prefill`.

    fairseq gives a language model the tokens of a prompt one by one. Here the first step hands over the
    whole prompt; the decoder then knows the answers to the steps within it. Hypotheses and scores are those
    of fairseq's generator. A memory in `net_input` precedes the prompts.

    Args:
        models: the models of the ensemble; those whose decoder has no `prefill` get their tokens one by one.
        tgt_dict: fairseq's dictionary.
        options: those of fairseq's generator.
    """

    def __init__(self, models: Any, tgt_dict: Any, **options: Any) -> None:
        super().__init__(PrefillingEnsemble(models), tgt_dict, **options)

    def _generate(
        self,
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
        bos_token: int | None = None,
    ) -> Any:
        source = sample["net_input"]["src_tokens"]
        prompt = source.new_full((source.shape[0], 1), self.eos if bos_token is None else bos_token)
        if prefix_tokens is not None:
            prompt = torch.cat([prompt, prefix_tokens], 1)
        sample = {**sample, "net_input": {**sample["net_input"], "prompt": prompt}}
        return super()._generate(sample, prefix_tokens, constraints, bos_token)


class PrefillingEnsemble(EnsembleModel):
    """Models that are handed the prompts at the first step.

    fairseq carries along what an encoder says; a language model has none, and the prompts take its place.
    """

    def forward_encoder(self, net_input: dict[str, Any]) -> Any:
        """The prompts, and the memory before them."""
        return [{"prompt": net_input["prompt"], "memory": net_input.get("memory")}]

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> Any:
        """The same: only the first step looks at the prompts, and before any reordering."""
        return encoder_outs

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> Any:
        """Log-probabilities of the next token, (B * beam, V)."""
        if tokens.shape[1] == 1:
            (handed,) = encoder_outs
            prompt = handed["prompt"]
            beams = torch.arange(prompt.shape[0], device=prompt.device)
            beams = beams.repeat_interleave(tokens.shape[0] // prompt.shape[0])
            for model, state in zip(self.models, incremental_states):
                if hasattr(model.decoder, "prefill"):
                    model.decoder.prefill(prompt, state, handed["memory"])
                    model.decoder.reorder_incremental_state_scripting(state, beams)
        return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)


def is_prefillable(models: Any) -> bool:
    """Whether `PrefillingGenerator` has an advantage for these models."""
    return any(hasattr(getattr(model, "decoder", None), "prefill") for model in models) and all(
        hasattr(model, "decoder") and not hasattr(model, "encoder") for model in models
    )
