"""Fixed points of a recurrence, at one position after another.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .options_deq import SolveOptions
from .rows_deq import Preconditioner
from .solve_deq import Solved, solve


@torch.no_grad()
def solve_recurrence(
    column: Callable[[Tensor, int], tuple[Callable[[Tensor], Tensor], Tensor]],
    z0: Tensor,
    real: Tensor,
    options: SolveOptions,
    preconditioner: Preconditioner | None = None,
) -> Solved:
    """Solve z_t = f_t(z_t) at one position after another; a state that has been found is not changed.

    Args:
        column: from the states (B, T, C), settled before t, and t, to two things: f_t as a map of the `own`
            leading channels (B, own) to all (B, C), and the state at which its solve starts, (B, own).
        z0: the states of positions at which f is never finite, (B, T, C).
        real, options, preconditioner: as for `solve`.
    """
    states, parts = z0.clone(), []
    for t in range(z0.shape[1]):
        f, start = column(states, t)
        own = _Column(f, start.shape[-1])
        part = solve(own, start.unsqueeze(1), real[:, t : t + 1], options, preconditioner)
        kept = torch.isfinite(part.residual) & real[:, t : t + 1]
        states[:, t] = torch.where(kept, own.whole(part.state), states[:, t])
        parts.append(part)
    residual, evaluations, converged = (
        torch.cat([getattr(part, name) for part in parts], 1)
        for name in ("residual", "evaluations", "converged")
    )
    return Solved(states, residual, evaluations, converged)


class _Column:
    """f at one position as a map of its own channels, (B, 1, own); the other channels follow from them."""

    def __init__(self, f: Callable[[Tensor], Tensor], own: int) -> None:
        self.f, self.own = f, own
        self.last: tuple[Tensor, Tensor] | None = None  # a state, and all channels of f there

    def __call__(self, x: Tensor) -> Tensor:
        self.last = (x, self.f(x[:, 0]))
        return self.last[1][:, None, : self.own]

    def whole(self, x: Tensor) -> Tensor:
        """All channels, (B, C), of the position whose own channels are x (B, 1, own)."""
        if self.last is None or not torch.equal(self.last[0], x):
            self(x)
        assert self.last is not None
        return torch.cat([x[:, 0], self.last[1][:, self.own :]], 1)
