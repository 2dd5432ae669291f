"""An exported deep equilibrium language model as a model of transformers.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

# transformers copies only the files that this one imports, so all of them must be imported here.
from .anderson_deq import History  # noqa: F401
from .configuration_deq import DEQConfig
from .decoder_deq import DEQDecoder, TextCache
from .options_deq import ModelOptions
from .recurrence_deq import solve_recurrence  # noqa: F401
from .rows_deq import Preconditioner  # noqa: F401
from .solve_deq import Solved  # noqa: F401
from .stack_deq import Stack  # noqa: F401
from .transformer_deq import TransformerLayer  # noqa: F401
from .trellis_deq import TrellisLayer  # noqa: F401
from .words_deq import Table  # noqa: F401

logger = logging.get_logger(__name__)

# The name of the cache in the outputs of transformers, which differs between its versions.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# With fewer converged positions than this share, a number does not describe the equilibrium.
ENOUGH = 0.99


@dataclass
class DEQOutput(CausalLMOutputWithPast):
    """Logits, the cache, and how the solves went.

    Attributes:
        evaluations: of the layer at each position, (B, T); 0 at padding.
        residual: |f(z) - z| / |f(z)| that was reached at each position, (B, T).
        converged: whether that is within the tolerance, (B, T) bool; False at padding.
        converged_share: the share of positions that converged, padding left out, ().
    """

    evaluations: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    converged_share: Tensor | None = None


class DEQForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that scores the next token at the equilibrium of one layer.

    It is for evaluation and generation only: to train further, use fairseq_deq and the checkpoint.

    Args:
        config: its configuration.
    """

    config_class = DEQConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _is_stateful = True  # the cache cannot be cut, so there is no assisted decoding
    _no_split_modules = ["DEQDecoder"]

    def __init__(self, config: DEQConfig) -> None:
        super().__init__(config)
        options = ModelOptions.of(config)
        _ = options.solve  # raises if an option is out of range
        self.model = DEQDecoder(options)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TextCache | None = None,
        cache: TextCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> DEQOutput | tuple[Any, ...]:
        """Score the next token at every position.

        Args:
            input_ids: tokens, (B, T); with a cache, only those that follow.
            attention_mask: (B, T), or (B, S + T) with a cache of S columns; 0 at padding, which may stand on
                the left or the right. None: the padding token is padding.
            past_key_values, cache: two names for the cache that an earlier call returned; it is updated.
            use_cache: whether to return the cache; None: yes.
            labels: tokens, (B, T), all but the first of which are predicted; -100 does not count.
            logits_to_keep: a number of last positions, or a tensor of positions, to return logits of; 0: all.
            return_dict: False: return a tuple.
        Returns:
            logits (B, T, V), which are log-probabilities if the softmax is adaptive, and the rest of
            `DEQOutput`.
        Raises:
            RuntimeError: the model is in training mode with gradients.
            ValueError: the cache is not one of this model.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this export is for evaluation and generation; call model.eval(), and train with fairseq_deq"
            )
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, TextCache):
            raise ValueError(f"the cache must be what an earlier call returned, got {type(cache).__name__}")
        with torch.no_grad():
            if cache is None:
                like = self.model.injection.weight
                cache = TextCache(self.model, input_ids.shape[0], like)
            real = torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is not None:
                real = attention_mask[:, -input_ids.shape[1] :].to(input_ids.device).bool()
            found = self.model.extract(input_ids, real, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.softmax(found.features[:, kept], self.model.embedding)
        share = (found.converged & found.real).sum() / found.real.sum().clamp(min=1)
        if found.real.any() and share < ENOUGH:
            logger.warning_once(
                f"only {100 * float(share):.2f}% of the positions converged: load the model with more "
                "evaluations, such as f_thres=120"
            )
        output = DEQOutput(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            **({} if use_cache is False else {CACHE: cache}),
            evaluations=found.evaluations,
            residual=found.residual,
            converged=found.converged & found.real,
            converged_share=share,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: TextCache | None = None,
        cache: TextCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_of_other_models: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the tokens that the cache has not seen."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
            input_ids = input_ids[:, cache.columns :] if whole else input_ids
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: transformers makes no cache, and the first `forward` makes one."""
        return False

    @staticmethod
    def _reorder_cache(past_key_values: TextCache, beam_idx: Tensor) -> TextCache:
        """Reorder the cache as the beams of a search."""
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is drawn, because every weight is in the file."""

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns tokens into embeddings."""
        return self.model.embedding

    def get_output_embeddings(self) -> None:
        """None, so that transformers ties no weights.

        A softmax that shares the weights of the embedding reads them there itself.
        """
        return None


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each label but the first given the tokens before it, in nats.

    Args:
        logits: (B, T, V).
        labels: (B, T); -100 does not count.
    Raises:
        ValueError: there are not logits of all positions.
    """
    if logits.shape[1] != labels.shape[1]:
        raise ValueError("labels need the logits of all positions: leave logits_to_keep out")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
