"""Which positions f is evaluated at is a matter of cost alone: bitwise, in solves that fail as well."""

from __future__ import annotations

import pytest
import torch
from models.builders import build_trellis, features, tokens


@pytest.mark.parametrize("seed", [2, 5, 7])
def test_a_text_with_abandoned_positions_is_the_same_whatever_is_gathered(seed):
    source = tokens(3, 40, seed=seed)

    def found(active_set: str, rows: torch.Tensor = source) -> torch.Tensor:
        model = build_trellis(
            seed=seed,
            solver_scope="position",
            f_solver="anderson",
            f_thres=60,
            f_eps=1e-4,
            active_set=active_set,
        )
        return features(model, rows)

    whole = found("never")
    assert torch.equal(found("always"), whole)
    assert torch.equal(found("auto"), whole)
    for row in range(3):
        assert torch.equal(found("auto", source[row : row + 1])[0], whole[row])
