"""Anderson acceleration, one small least-squares problem per lane, solved with NumPy on the host."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

from .config import SolverConfig
from .least_squares import NO_PIVOT, least_squares, ridge_table
from .record import Array
from .registry import Precondition, register_solver
from .rows import forget_rows, select_rows, to_rows
from .stacked_anderson import StackedAnderson


class Anderson:
    """Type-II Anderson acceleration in its difference form.

    With g_k = f(z_k) - z_k, and DZ = [z_k - z_{k-1}, ...], DG = [g_k - g_{k-1}, ...] over the last
    `memory` states: gamma = argmin |g_k - DG*gamma|, z_{k+1} = z_k - DZ*gamma + tau*P (g_k - DG*gamma), with
    P the preconditioner, or I. P acts on the remaining residual, not on the history.

    The least squares is solved through its Gram matrix, kept up to date with the inner products that are new,
    its columns scaled to length one, with a relative ridge, in float64. Where lanes depend on each other, the
    ridge of a difference grows with its age, min(1, ridge*ridge_growth^age), because the other lanes have
    changed since it was taken, and with them f at this lane.
    Anderson (1965); Walker and Ni (2011).
    """

    default_memory = 5

    def __init__(self, config: SolverConfig, like: Tensor, books: Array) -> None:
        slots = (config.memory or self.default_memory) - 1
        self.has_ridge = config.ridge > NO_PIVOT
        self.count = 0  # differences taken, or passed over
        # One tensor per slot, (n, D), None where nothing was stored yet: rows stay contiguous.
        self.dz: list[Tensor | None] = [None] * slots
        self.dg: list[Tensor | None] = [None] * slots
        self.gram = np.zeros((slots, slots, len(books)))  # DG^T DG
        self.rhs = np.zeros((slots, len(books)))  # DG^T g
        self.ridges = ridge_table(config, np.arange(slots, dtype=np.float64))
        self.last_z: Tensor | None = None
        self.last_g: Tensor | None = None

    def observe(
        self, z: Tensor, g: Tensor, restarted: Array | None, precondition: Precondition
    ) -> list[Tensor]:
        """Put the newest differences in the oldest slot; <DG_j, DG_new> for all j, and <DG_new, g>."""
        if self.last_z is None or self.last_g is None:
            return []
        i = self.count % len(self.dg)
        dz, dg = self.dz[i], self.dg[i]
        self.dz[i] = dz = z - self.last_z if dz is None else torch.sub(z, self.last_z, out=dz)
        self.dg[i] = dg = g - self.last_g if dg is None else torch.sub(g, self.last_g, out=dg)
        if restarted is not None:
            for history in (*self.dz, *self.dg):
                if history is not None:
                    forget_rows(history, restarted)
            self.gram, self.rhs = self.gram * ~restarted, self.rhs * ~restarted
        return [*(vecdot(d, dg) for d in self.dg if d is not None), vecdot(dg, g)]

    def step(
        self, products: Array, z: Tensor, g: Tensor, tau: Array | None, precondition: Precondition
    ) -> Tensor:
        left, following = g, z
        if len(products):
            self._enter(products)
            ridges = self.ridges[(self.count - 1) % len(self.dg)]
            weights = to_rows(-self._least_squares(self.gram, self.rhs, ridges), z).unbind()  # (n, 1) each
            for weight, dz, dg in zip(weights, self.dz, self.dg):
                if dz is None or dg is None:
                    continue
                if left is g:  # which nobody writes to, nor to z
                    left, following = torch.addcmul(g, dg, weight), torch.addcmul(z, dz, weight)
                else:
                    left.addcmul_(dg, weight)
                    following.addcmul_(dz, weight)
        self.last_z, self.last_g = z, g
        left = precondition(left)
        if following is z:  # which nobody writes to
            return following + left if tau is None else torch.addcmul(following, left, to_rows(tau, z))
        return following.add_(left) if tau is None else following.addcmul_(left, to_rows(tau, z))

    def skip(self) -> None:
        self.count += 1

    def subset(self, source: Array) -> Anderson:
        part = copy.copy(self)
        part.dz = [None if d is None else select_rows(d, source) for d in self.dz]
        part.dg = [None if d is None else select_rows(d, source) for d in self.dg]
        known = source >= 0
        part.gram, part.rhs = self.gram[..., source] * known, self.rhs[..., source] * known
        if self.last_z is not None and self.last_g is not None:
            part.last_z, part.last_g = select_rows(self.last_z, source), select_rows(self.last_g, source)
        return part

    def inverse_transpose(self, vector: Tensor, precondition: Precondition) -> Tensor:
        """P^T v - DG (DG^T DG)^{-1} (DG^T P^T v + DZ^T v): the transpose of g -> the step, whose tau is 1."""
        estimate = precondition(vector)
        # Between `observe` and `step` the Gram matrix lags behind the differences: it is made anew.
        gram, along = self.gram * 0, self.rhs * 0
        for i, (dz, dg) in enumerate(zip(self.dz, self.dg)):
            if dz is not None and dg is not None:
                along[i] = (vecdot(dg, estimate) + vecdot(dz, vector)).numpy()
                for j, other in enumerate(self.dg):
                    if other is not None:
                        gram[i, j] = vecdot(dg, other).numpy()
        weights = self._least_squares(gram, along, self.ridges.diagonal())
        estimate = estimate.clone()
        for weight, dg in zip(to_rows(weights, vector), self.dg):
            if dg is not None:
                estimate.addcmul_(dg, weight, value=-1)
        return estimate

    def _enter(self, products: Array) -> None:
        """Bring DG^T g and the Gram matrix up to date with what `observe` asked for."""
        i = self.count % len(self.dg)
        self.count += 1
        row, last = products[:-1], products[-1]
        if len(row) < len(self.dg):  # some slots are empty
            entries, row = iter(row), self.rhs * 0
            for j, d in enumerate(self.dg):
                if d is not None:
                    row[j] = next(entries)
        self.gram[i] = row
        self.gram[:, i] = row
        # g has changed by DG_i, so DG^T g has changed by what is new, save for the new column.
        self.rhs += row
        self.rhs[i] = last

    def _least_squares(self, gram: Array, rhs: Array, ridges: Array) -> Array:
        """gamma, (slots, n), of DG^T DG gamma = rhs."""
        slots = [i for i, d in enumerate(self.dg) if d is not None]
        return least_squares(gram, rhs, ridges, self.has_ridge, slots)


@register_solver("anderson")
def anderson(config: SolverConfig, like: Tensor, books: Array) -> Anderson | StackedAnderson:
    """Anderson's method; off the CPU, where each small operation costs a launch, the stacked one."""
    return (StackedAnderson if isinstance(books, Tensor) else Anderson)(config, like, books)
