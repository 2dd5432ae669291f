"""Checkpoints of earlier versions load, and score as they did when they were written.

The files were written by `fairseq-train` after 120 updates: `*_0.1.0.pt` by version 0.1.0, `*_learned.pt`
later, with what solves have learned. The numbers beside them are scores by the code of that day.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf

import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq.checkpoint_file import read_checkpoint

FOLDER = Path(__file__).parent / "data" / "checkpoints"
NAMES = sorted(path.stem for path in FOLDER.glob("*.pt"))


def _text() -> torch.Tensor:
    """Two rows of tokens, (2, 12)."""
    return torch.randint(4, 28, (2, 12), generator=torch.Generator().manual_seed(3))


def scores(name: str) -> list[list[float]]:
    """Log-probabilities of the next token at every position, of equilibria to 1e-6, (2, 11)."""
    state = read_checkpoint(FOLDER / f"{name}.pt")
    cfg = OmegaConf.create(state["cfg"])
    cfg.model.f_eps, cfg.model.f_thres = 1e-6, 300
    words = Dictionary()
    for i in range(24):
        words.add_symbol(f"w{i}")
    words.pad_to_multiple_(8)  # as fairseq-preprocess does
    task = tasks.TASK_REGISTRY["deq_language_modeling"](cfg.task, words)
    model = task.build_model(cfg.model)
    model.load_state_dict(state["model"], strict=True)
    model.eval().set_num_updates(120)
    text = _text()
    with torch.no_grad():
        logits, extra = model(text[:, :-1])
    assert all(bool(e.result.converged.all()) for e in extra["equilibria"])
    return logits.log_softmax(-1).gather(-1, text[:, 1:].unsqueeze(-1)).squeeze(-1).tolist()


def test_both_families_are_there():
    assert NAMES == ["transformer_0.1.0", "transformer_learned", "trellisnet_0.1.0", "trellisnet_learned"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_checkpoint_scores_as_it_did(name):
    stored = torch.tensor(json.loads((FOLDER / "scores.json").read_text())[name])
    torch.testing.assert_close(torch.tensor(scores(name)), stored, rtol=0, atol=2e-5)
    assert stored.std() > 0.5  # scores of trained weights, which tell one model from another


if __name__ == "__main__":
    print(json.dumps({name: scores(name) for name in NAMES}))
