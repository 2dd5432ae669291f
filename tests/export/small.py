"""Small random models as checkpoints, and what an export makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from models.builders import EXACT, VOCABULARY, build, build_trellis, dictionary, taught

from fairseq_deq.export.checkpoint import read_model
from fairseq_deq.export.remote.decoder_deq import DEQDecoder, TextCache
from fairseq_deq.models.deq_transformer_lm import DEQTransformerConfig
from fairseq_deq.models.deq_trellisnet_lm import DEQTrellisNetConfig

CONFIGS = {
    "transformer": (
        "deq_transformer_lm",
        DEQTransformerConfig,
        {"decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2},
        build,
    ),
    "trellisnet": ("deq_trellisnet_lm", DEQTrellisNetConfig, {"nhid": 8, "init_std": 0.4}, build_trellis),
}
# An export evaluates all positions, so that rounding is the same where the package does so too.
SOLVE = {"f_solver": "anderson", "f_thres": 100, "f_eps": 1e-6, "active_set": "never"}
ADAPTIVE = {"adaptive_input": "true", "adaptive_input_cutoff": "10,20", "adaptive_softmax_cutoff": "10,20"}
TIED = ADAPTIVE | {"tie_adaptive_weights": "true"}
# Every variant of the Transformer's layer.
VARIANT = {
    "activation_fn": "gelu",
    "decoder_gated_ffn": "true",
    "decoder_norm_affine": "true",
    "decoder_input_residual": "true",
}


@dataclass
class Small:
    """A model of the package, and its checkpoint."""

    model: Any
    path: Path

    def log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of every word after each token, (B, T, V)."""
        with torch.no_grad():
            return self.model.get_normalized_probs(self.model(tokens), log_probs=True)

    def exported(self, **overrides: Any) -> DEQDecoder:
        """What an export makes of the checkpoint."""
        found = read_model(self.path, overrides)
        decoder = DEQDecoder(found.options)
        decoder.load_state_dict(found.weights.tensors)
        return decoder.eval()


def small(folder: Path, family: str, teach: bool = False, seed: int = 0, **options: Any) -> Small:
    """A random model in float32, saved in `folder`.

    Args:
        folder: where to.
        family: `transformer` or `trellisnet`.
        teach: whether it is to know a preconditioner and a start.
        seed: of the weights.
        options: those of the command line.
    """
    name, config, sizes, builder = CONFIGS[family]
    options = SOLVE | options
    model = builder(seed, torch.float32, **options)
    draw_softmax(model)
    if teach:
        taught(model)
    path = folder / "checkpoint.pt"
    save(path, model, name, config(**(EXACT | sizes | options | {"max_update": 9})))
    words = dictionary().symbols[4:]
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    return Small(model, path)


def draw_softmax(model: Any) -> None:
    """Draw what a softmax begins with as nothing: its biases, and the projection of its head."""
    softmax = model.decoder.adaptive_softmax or model.decoder.output_projection
    if softmax is not None:
        with torch.no_grad():
            for name, parameter in softmax.named_parameters():
                if name.endswith("bias") or "projection." in name:
                    parameter.normal_()


def save(path: Path, net: Any, name: str, config: Any, updates: int = 9, **changed: Any) -> None:
    """Write what fairseq-train would, as far as an export reads it; `changed` replaces parts of it."""
    values = {key: v.value if isinstance(v, Enum) else v for key, v in asdict(config).items()}
    state = {
        "args": None,
        "cfg": {"model": values | {"_name": name}, "task": {"_name": "language_modeling", "data": ""}},
        "model": net.state_dict(),
        "optimizer_history": [{"num_updates": updates}],
        "extra_state": {},
    }
    torch.save(state | changed, path)


def scores(
    decoder: DEQDecoder, tokens: torch.Tensor, real: torch.Tensor | None = None, steps: Sequence[int] = ()
) -> tuple[torch.Tensor, TextCache]:
    """Log-probabilities (B, T, V), and the cache; read in parts that end at `steps`, and then the rest."""
    cache = TextCache(decoder, tokens.shape[0], decoder.injection.weight)
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    parts = []
    begin = 0
    with torch.no_grad():
        for end in (*steps, tokens.shape[1]):
            found = decoder.extract(tokens[:, begin:end], real[:, begin:end], cache)
            logits = decoder.softmax(found.features, decoder.embedding)
            parts.append((logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1))
            begin = end
    return torch.cat(parts, 1), cache


__all__ = [
    "ADAPTIVE",
    "CONFIGS",
    "SOLVE",
    "TIED",
    "VARIANT",
    "VOCABULARY",
    "Small",
    "save",
    "scores",
    "small",
]
