"""Memory: what is kept, in which order, and what is cut off."""

import pytest
import torch

from fairseq_deq.layers.memory import Memory


def _positions(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A state and an injection that carry their position as their value."""
    time = torch.arange(first, last, dtype=torch.float32).view(1, -1, 1)
    return time.expand(2, -1, 3), 10 * time.expand(2, -1, 9)


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (2, [5, 6]), (4, [3, 4, 5, 6]), (99, list(range(7)))])
def test_extended_keeps_the_newest_positions_in_order(keep, kept):
    memory = Memory(*_positions(0, 4)).extended(*_positions(4, 7), keep)
    assert memory.length == len(kept)
    assert memory.state[1, :, 2].tolist() == kept
    assert memory.injection[1, :, 8].tolist() == [10 * t for t in kept]


def test_extended_passes_gradients_and_detached_does_not():
    state, injection = (x.clone().requires_grad_() for x in _positions(4, 7))
    memory = Memory(*_positions(0, 4)).extended(state, injection, 5)
    assert memory.state.requires_grad
    assert memory.injection.requires_grad
    cut = memory.detached()
    assert not cut.state.requires_grad
    assert not cut.injection.requires_grad
    assert torch.equal(cut.state, memory.state)
