"""A tiny model with one equilibrium, and those trained on pieces of words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pieces import pieces

__all__ = ["pieces"]  # a fixture for this folder


@pytest.fixture(scope="session")
def unique_checkpoint(deq_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint with weights whose equilibrium is the only one (cf. `models.builders.build`)."""
    state = torch.load(deq_checkpoint, weights_only=False)
    gains = {"injection.weight": 4.0, "qkv.weight_v": 0.5, "out.weight_v": 8.0, "ffn_out.weight_v": 0.5}
    scaled = set()
    for name, tensor in state["model"].items():
        for end, gain in gains.items():
            if name.endswith("." + end):
                tensor.mul_(gain)
                scaled.add(end)
    assert scaled == set(gains)
    path = tmp_path_factory.mktemp("unique") / "checkpoint_last.pt"
    torch.save(state, path)
    return path
