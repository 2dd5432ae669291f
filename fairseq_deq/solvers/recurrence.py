"""Fixed points of a recurrence: position after position, each from what the ones before it settled at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .config import SolverConfig
from .ledger import Ledger
from .registry import get_solver
from .result import FixedPoint


@runtime_checkable
class Recurrent(Protocol):
    """A map over (B, T, C) whose positions can be settled one after another."""

    @property
    def own(self) -> int:
        """Leading channels of a position through which it depends on itself."""

    @property
    def order(self) -> Sequence[int]:
        """The positions, each after all the others that it depends on."""

    def start(self, z: Tensor, t: int) -> Tensor:
        """Where to start at position t, (B, own), with those before it in `order` held at z."""

    def column(self, z: Tensor, t: int) -> Callable[[Tensor], Tensor]:
        """f at position t of every sample, with those before it in `order` held at z: (B, own) -> (B, C).

        A row must depend on no other row. A layer whose backward pass is to be solved likewise has an
        `adjoint` that is a `Recurrent` too.
        """


@torch.no_grad()
def solve_recurrence(f: Recurrent, z0: Tensor, config: SolverConfig) -> FixedPoint:
    """Find z_t = f_t(z_t; z_before), one small solve a position, for all samples at once.

    What is solved for are the `own` channels of a position. Its other channels follow from them, so the
    residual of a lane is that of its own channels: large ones that are no unknowns would hide it. Others look
    at a position only when it has been left for good, so a state depends on nothing but the positions before
    it, converged or not. Each position starts where f says, so which one of several equilibria is found does
    not depend on how a text is cut into segments.

    Args:
        f: the recurrence.
        z0: state of the lanes at which f is never finite, (B, T, C).
        config: solver, tolerance, budget of evaluations of one position; `patience` evaluations after which a
            lane that has not come closer restarts from its best state with half the step.
    Returns:
        the `FixedPoint`; its lanes are positions, and `iterations` counts the evaluations of the position
        that took most.
    """
    batch, length, _ = z0.shape
    narrow = z0.dtype in (torch.float16, torch.bfloat16)
    states = z0.detach().float() if narrow else z0.detach().clone()
    ledgers: list[Ledger] = [Ledger.start(batch, config.damping, states)] * length
    iterations = computed = 0
    for t in f.order:
        column, start = f.column(states, t), f.start(states, t)
        states[:, t], ledgers[t], count = _settle(column, states[:, t], start, config)
        iterations = max(iterations, count)
        computed += count
    ledger = Ledger(
        *(torch.stack([getattr(x, n.name) for x in ledgers], 1).flatten() for n in fields(Ledger))
    )
    return FixedPoint(
        state=states.to(z0.dtype),
        residual=ledger.residual().view(batch, length),
        evaluations=ledger.evaluations.view(batch, length),
        status=ledger.status(config.patience).view(batch, length),
        iterations=iterations,
        lane_evaluations=computed * batch,
    )


def _settle(
    f: Callable[[Tensor], Tensor], fallback: Tensor, x: Tensor, config: SolverConfig
) -> tuple[Tensor, Ledger, int]:
    """Solve one position of every sample; rows are samples, and no row sees another.

    Most positions settle within `patience` evaluations, and a frozen row evaluates to what it did before. So
    what was measured is entered into the books only where some row needs more.

    Args:
        f: the map there, (B, own) -> (B, C).
        fallback: states where f is not finite, (B, C).
        x: where to start, (B, own).
        config: the options.
    Returns:
        the states (B, C), what is to be told of them, and the number of evaluations of f.
    """
    books = _Books(fallback, x, config)
    stepper = get_solver(config.solver)(config, x)
    fresh: Tensor | None = books.ledger.fresh.unsqueeze(1)
    tau = books.ledger.tau.unsqueeze(1) if config.damping < 1 else None
    floor = config.atol * x.shape[1] ** 0.5
    largest = torch.finfo(x.dtype).max
    moving = books.ledger.moving
    for k in range(1, config.max_evals + 1):
        fz = f(x)
        target = fz[:, : x.shape[1]]
        g = target - x
        size, distance = torch.linalg.vector_norm(target, dim=1), torch.linalg.vector_norm(g, dim=1)
        passed = distance <= (config.rtol * size + floor).clamp_(max=largest)
        books.waiting.append((x, fz, distance, size, passed))
        moving = moving & ~passed
        if not bool(moving.any()):
            return books.all_passed(k)
        if k == config.max_evals:
            break
        following = stepper.step(x, target, g, fresh, tau)
        fresh = None
        if k % config.patience == 0:
            lost = books.lost()
            if lost is not None:
                moving, fresh, tau = books.ledger.moving, lost, books.ledger.tau.unsqueeze(1)
                following = torch.where(lost, books.best, following)
        x = torch.where(moving.unsqueeze(1), following, x)
    books.enter()
    return books.state(), books.ledger, config.max_evals


class _Books:
    """The ledger of one position and the best states, (B, own), with f there, (B, C)."""

    def __init__(self, fallback: Tensor, x: Tensor, config: SolverConfig) -> None:
        self.own, self.patience = x.shape[1], config.patience
        self.best, self.best_fz = fallback[:, : self.own], fallback
        self.ledger = Ledger.start(x.shape[0], config.damping, x)
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []  # not entered yet

    def enter(self) -> None:
        """Enter what is waiting, in its order."""
        for x, fz, distance, size, passed in self.waiting:
            distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
            better = self.ledger.record(distance, size, passed).unsqueeze(1)
            self.best, self.best_fz = torch.where(better, x, self.best), torch.where(better, fz, self.best_fz)
        self.waiting.clear()

    def lost(self) -> Tensor | None:
        """(B, 1), the rows that start again; None where there is none."""
        self.enter()
        lost = self.ledger.lost(self.patience)
        if not bool(lost.any()):
            return None
        self.ledger.restart(lost)
        return lost.unsqueeze(1)

    def all_passed(self, count: int) -> tuple[Tensor, Ledger, int]:
        """The outcome after `count` evaluations, of which the last found every row settled, or given up."""
        ledger = self.ledger
        if count > self.patience:
            self.enter()
            return self.state(), ledger, count
        (x, fz, distance, size, _), (*_, first, _, _) = self.waiting[-1], self.waiting[0]
        waited = torch.stack([~passed for *_, passed in self.waiting])
        ledger.evaluations = waited.sum(0, dtype=torch.int32) + 1
        ledger.best_distance, ledger.best_size, ledger.first_distance = distance, size, first
        ledger.moving = torch.zeros_like(ledger.moving)
        self.best, self.best_fz = x, fz
        return self.state(), ledger, count

    def state(self) -> Tensor:
        """The best states, (B, C): what was solved for, and what follows from it."""
        return torch.cat([self.best, self.best_fz[:, self.own :]], 1)
