"""Variants of the DEQ-Transformer layer beside the published one, and weights that tell them apart."""

from __future__ import annotations

import torch
from torch import nn

EVERYTHING = {
    "activation": "gelu",
    "gated_ffn": True,
    "norm_affine": True,
    "input_residual": True,
}
# Arguments of `TransformerLayer`: each value of each at least once, in every form of the layer.
VARIANTS = [
    {"activation": "gelu"},
    {"activation": "silu", "pre_norm": True},
    {"gated_ffn": True},
    {"norm": "rms", "input_residual": True},
    {"norm_affine": True, "pre_norm": True, "closing_norm": False, "input_residual": True},
    {"norm": "rms", "norm_affine": True, "activation": "silu", "gated_ffn": True, "pre_norm": True},
    {"positions": "rotary"},
    EVERYTHING,
    EVERYTHING | {"positions": "rotary", "pre_norm": True, "local_size": 4},
]


@torch.no_grad()
def draw_vectors(layer: nn.Module) -> None:
    """Draw the biases and the gains of norms, which begin at 0 and 1."""
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.gain"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_()
