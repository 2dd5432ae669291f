"""Limited-memory good Broyden that stores its steps only."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .config import SolverConfig
from .registry import register_solver, select_rows


@register_solver("broyden")
class Broyden:
    """Good Broyden for g(z) = f(z) - z = 0 with B_0 = -tau*I, so the first step goes to z_0 + tau*g_0.

    With s_j the steps taken, the inverse update is a product of rank-one factors,
    -B_k g = prod_{j<k} (I + s_{j+1} s_j^T/|s_j|^2) g, and s_k = -B_k g_k = w / (1 - s_{k-1}^T w/|s_{k-1}|^2)
    with w the product over the factors known so far. A step has length 1: tau scales B_0, and changes only
    where a lane starts afresh. Only the s_j are kept; their inner products, kept
    beside them, turn the product into one triangular recurrence and two passes over the steps. When
    `memory` steps are stored the lane starts again from B_0.
    Broyden (1965); Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 7.3.
    """

    default_memory = 32

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        self.memory = config.memory or self.default_memory
        self.rest = torch.zeros_like(like)  # the step of a lane that rests
        self.steps: list[Tensor] = []  # each (n, D), oldest first
        self.inner: list[Tensor] = []  # inner[j] = <s_i, s_j> for i <= j, (n, j+1)

    def step(self, z: Tensor, fz: Tensor, g: Tensor, fresh: Tensor | None, tau: Tensor | None) -> Tensor:
        if len(self.steps) == self.memory:
            self.steps, self.inner = [], []
        if fresh is not None:
            for rows in (*self.steps, *self.inner):
                rows.masked_fill_(fresh, 0)
        move = self._newton_step(g if tau is None else g * tau)
        self._remember(move)
        return z + move

    def skip(self) -> None:
        if len(self.steps) == self.memory:
            self.steps, self.inner = [], []
        self._remember(self.rest)

    def subset(self, source: Tensor) -> Broyden:
        part = copy.copy(self)
        part.rest = select_rows(self.rest, source)
        part.steps = [select_rows(s, source) for s in self.steps]
        part.inner = [select_rows(p, source) for p in self.inner]
        return part

    def inverse_transpose(self, vector: Tensor) -> Tensor:
        """prod_{j} (I + s_j s_{j+1}^T/|s_j|^2), the newest factor first, over the steps stored."""
        estimate = vector
        for j in range(len(self.steps) - 2, -1, -1):
            square = self.inner[j][:, j]
            along = torch.linalg.vecdot(self.steps[j + 1], estimate)
            weight = torch.where(square > 0, along / square, torch.zeros_like(along))
            estimate = torch.addcmul(estimate, self.steps[j], weight.unsqueeze(1))
        return estimate

    def _newton_step(self, g: Tensor) -> Tensor:
        """-B_k g from the stored steps; rows whose steps are zero (fresh) give g itself."""
        count = len(self.steps)
        if count == 0:
            return g.clone()
        stack = torch.stack(self.steps, 1)  # (n, k, D)
        along = torch.matmul(stack, g.unsqueeze(-1)).squeeze(-1)  # (n, k): <s_j, g>
        # w = g + sum_{j<k-1} c_j s_{j+1}, with c_j = <s_j, w before factor j> / |s_j|^2
        coefficients: list[Tensor] = []
        for j in range(count):
            value = along[:, j]
            for i, c in enumerate(coefficients):
                low, high = min(i + 1, j), max(i + 1, j)
                value = value + c * self.inner[high][:, low]
            square = self.inner[j][:, j]
            coefficients.append(torch.where(square > 0, value / square, torch.zeros_like(value)))
        last = coefficients.pop()
        w = g
        if coefficients:
            c = torch.stack(coefficients, 1).unsqueeze(1)  # (n, 1, k-1)
            w = g + torch.bmm(c, stack[:, 1:]).squeeze(1)
        denominator = 1 - last
        # A denominator near zero means a singular update: take the step without the newest factor.
        safe = denominator.abs() > 1e-4
        return w / torch.where(safe, denominator, torch.ones_like(denominator)).unsqueeze(-1)

    def _remember(self, move: Tensor) -> None:
        self.steps.append(move)
        self.inner.append(torch.stack([(s * move).sum(-1) for s in self.steps], 1))
