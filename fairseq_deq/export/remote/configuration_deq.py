"""The configuration of an exported model, for transformers.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import PretrainedConfig

from .options_deq import ModelOptions

DEFAULTS = {f.name: f.default for f in fields(ModelOptions) if f.default is not MISSING}


class DEQConfig(PretrainedConfig):
    """The options of `options_deq.ModelOptions` as attributes, and those of every transformers model.

    Options of the solve may be changed when a model is loaded: `from_pretrained(..., f_eps=1e-4)`.

    Args:
        options: both kinds, by name.
    """

    model_type = "deq_lm"

    def __init__(self, **options: Any) -> None:
        own = {name: options.pop(name, default) for name, default in DEFAULTS.items()}
        options.setdefault("tie_word_embeddings", False)  # the model ties its weights itself
        super().__init__(**options)
        for name, value in own.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    @property
    def hidden_size(self) -> int:
        """Channels of the features that the softmax reads."""
        return self.output_dim if self.family == "trellisnet" else self.embed_dim

    @property
    def num_hidden_layers(self) -> int:
        """1: one layer, at its equilibrium."""
        return 1

    @property
    def num_attention_heads(self) -> int:
        """Number of attention heads."""
        return self.heads
