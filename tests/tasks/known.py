"""Trainings in which solves teach, and what they have taught."""

from __future__ import annotations

from pathlib import Path

import torch
from runs import read_weights

TASK = (
    *("--task", "deq_language_modeling", "--criterion", "deq_lm_loss", "--tokens-per-sample", "16"),
    *("--num-workers", "0", "--cpu", "--seed", "3", "--log-format", "json", "--log-interval", "1"),
    *("--disable-validation", "--mem-len", "8", "--decoder-embed-dim", "16", "--max-update", "23"),
)
FAMILIES = {
    "transformer": (
        *("--arch", "deq_transformer_lm_tiny", "--decoder-ffn-embed-dim", "32"),
        *("--decoder-attention-heads", "2"),
    ),
    "trellis": ("--arch", "deq_trellisnet_lm_tiny", "--nhid", "8"),
}
FAMILIES["two layers"] = (*FAMILIES["transformer"], "--decoder-layers", "2")
ADAM = ("--optimizer", "adam", "--lr", "0.01", "--clip-norm", "0.5")

KNOWLEDGE = ("learned_start", "learned_preconditioner")
# In the 23 updates of TASK: after updates 1, 11 and 21.
RENEWALS = 3


def read_knowledge(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of it."""
    weights = read_weights(path)
    found = {name: tensor for name, tensor in weights.items() if any(part in name for part in KNOWLEDGE)}
    assert len(found) >= 8
    return found


def check_known(path: Path, renewals: int = RENEWALS) -> None:
    """All of it has been renewed as often as that, and is more than nothing."""
    known = read_knowledge(path)
    for part, tensor in (("learned_start", "weight"), ("learned_preconditioner", "left")):
        assert known[f"decoder.knowledge.{part}.renewals"] == renewals
        assert known[f"decoder.knowledge.{part}.{tensor}"].norm() > 1e-3
