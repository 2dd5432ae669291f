"""Limited-memory good Broyden that stores its steps only; coefficients are computed on the host."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

from .config import SolverConfig
from .record import Array
from .registry import Precondition, register_solver
from .rows import forget_rows, select_rows, to_rows
from .stacked_broyden import LEAST_DENOMINATOR, StackedBroyden, transposed_factors


class Broyden:
    """Good Broyden for g(z) = f(z) - z = 0 with B_0^{-1} = -tau*P, so the first step goes to z_0 + tau*P g_0.

    With s_j the steps taken, the inverse update is a product of rank-one factors,
    -B_k^{-1} g = prod_{j<k} (I + s_{j+1} s_j^T/|s_j|^2) tau*P g, and
    s_k = -B_k^{-1} g_k = w / (1 - s_{k-1}^T w/|s_{k-1}|^2), with w the product over the factors known so far.
    A step has length 1: tau scales B_0^{-1}, and changes only where a lane restarts. Only the s_j are kept;
    their inner products, kept beside them, turn the product into one triangular recurrence and two passes
    over the steps. When `memory` steps are stored the lane starts again from B_0.
    Broyden (1965); Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 7.3.
    """

    default_memory = 32

    def __init__(self, config: SolverConfig, like: Tensor, books: Array) -> None:
        self.memory = config.memory or self.default_memory
        self.rest = torch.zeros_like(like)  # the step of a lane that rests
        self.steps: list[Tensor] = []  # each (n, D), oldest first
        self.inner: list[Array] = []  # inner[j] = <s_i, s_j> for i <= j, (j+1, n)
        self.proposal = like  # P g
        self.lanes = len(books)

    def observe(
        self, z: Tensor, g: Tensor, restarted: Array | None, precondition: Precondition
    ) -> list[Tensor]:
        """<s_j, s_new> for all j up to the newest step, then <s_j, P g>."""
        self._start_again_when_full()
        self.proposal = precondition(g)
        if restarted is not None:
            for rows in self.steps:
                forget_rows(rows, restarted)
            self.inner = [products * ~restarted for products in self.inner]
        new = self.steps[len(self.inner) :]
        return [
            *(vecdot(s, last) for last in new for s in self.steps),
            *(vecdot(s, self.proposal) for s in self.steps),
        ]

    def step(
        self, products: Array, z: Tensor, g: Tensor, tau: Array | None, precondition: Precondition
    ) -> Tensor:
        move = self.proposal if tau is None else self.proposal * to_rows(tau, z)
        count = len(self.steps)
        if count:
            if len(self.inner) < count:
                self.inner.append(products[:count])
            along = products[len(products) - count :]
            move = self._newton_step(move, along if tau is None else along * tau)
        self.steps.append(move)
        return z + move

    def skip(self) -> None:
        self._start_again_when_full()
        while len(self.inner) < len(self.steps):  # a lane that moves later starts without a history
            self.inner.append(np.zeros((len(self.inner) + 1, self.lanes)))
        self.steps.append(self.rest)
        self.inner.append(np.zeros((len(self.steps), self.lanes)))

    def subset(self, source: Array) -> Broyden:
        part = copy.copy(self)
        part.rest, part.proposal = select_rows(self.rest, source), select_rows(self.proposal, source)
        part.steps = [select_rows(s, source) for s in self.steps]
        known = source >= 0
        part.lanes = len(source)
        part.inner = [p[:, source] * known for p in self.inner]
        return part

    def inverse_transpose(self, vector: Tensor, precondition: Precondition) -> Tensor:
        """P^T prod_{j} (I + s_j s_{j+1}^T/|s_j|^2), the newest factor first, over the steps stored."""
        return precondition(transposed_factors(self.steps, vector))

    def _start_again_when_full(self) -> None:
        if len(self.steps) == self.memory:
            self.steps, self.inner = [], []

    def _newton_step(self, proposal: Tensor, along: Array) -> Tensor:
        """-B_k^{-1} g from the stored steps; a row whose steps are zero gives the proposal itself.

        Args:
            proposal: tau*P g, (n, D).
            along: <s_j, proposal>, (k, n).
        """
        # w = proposal + sum_{j<k-1} c_j s_{j+1}, with c_j = <s_j, w before factor j> / |s_j|^2
        coefficients: list[Array] = []
        for j in range(len(along)):
            value = along[j]
            for i, c in enumerate(coefficients):
                low, high = min(i + 1, j), max(i + 1, j)
                value = value + c * self.inner[high][low]
            square = self.inner[j][j]
            known = square > 0
            coefficients.append(np.where(known, value / np.where(known, square, 1.0), 0.0))
        last = coefficients.pop()
        w = proposal
        if coefficients:
            weights = to_rows(np.stack(coefficients), proposal)
            w = proposal.clone()
            for weight, step in zip(weights, self.steps[1:]):
                w.addcmul_(step, weight)
        denominator = 1 - last
        # A denominator near zero means a singular update: take the step without the newest factor.
        safe = abs(denominator) > LEAST_DENOMINATOR
        return w / to_rows(np.where(safe, denominator, 1.0), proposal)


@register_solver("broyden")
def broyden(config: SolverConfig, like: Tensor, books: Array) -> Broyden | StackedBroyden:
    """Broyden's method; off the CPU, where each small operation costs a launch, the stacked one."""
    return (StackedBroyden if isinstance(books, Tensor) else Broyden)(config, like, books)
