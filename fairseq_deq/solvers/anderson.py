"""Anderson acceleration, one small least-squares problem a lane."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.linalg import vecdot

from .config import SolverConfig
from .registry import register_solver, select_rows


@register_solver("anderson")
class Anderson:
    """Type-II Anderson acceleration in its difference form.

    With g_k = f(z_k) - z_k, DG = [g_k - g_{k-1}, ...] and DF = [f_k - f_{k-1}, ...] over the last
    `memory` states: gamma = argmin |g_k - DG*gamma|, z_{k+1} = f_k - DF*gamma - (1-tau)*(g_k - DG*gamma).

    The least squares is solved through its Gram matrix, columns scaled to length one, with a relative
    ridge, in float32 or better; lanes for which that fails are solved by `lstsq`.
    Anderson (1965); Walker and Ni (2011).
    """

    default_memory = 3

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        n, dim = like.shape
        self.ridge = config.ridge
        slots = (config.memory or self.default_memory) - 1
        self.slot = 0
        # One tensor a slot: rows stay contiguous, and inner products run at the speed of memory.
        self.df = [like.new_zeros(n, dim) for _ in range(slots)]
        self.dg = [like.new_zeros(n, dim) for _ in range(slots)]
        self.gram = like.new_zeros(n, slots, slots)  # DG^T DG
        self.rhs = like.new_zeros(n, slots)  # DG^T g
        self.last_f = like.new_zeros(n, dim)
        self.last_g = like.new_zeros(n, dim)

    def step(self, z: Tensor, fz: Tensor, g: Tensor, fresh: Tensor | None, tau: Tensor | None) -> Tensor:
        self._remember(fz, g, fresh)
        weights = self._least_squares(self.rhs, g).neg_()
        # A lane of step length 1 gets the same numbers whether or not another lane has a shorter one.
        following = fz.clone() if tau is None else torch.addcmul(fz, g, tau - 1)
        for i, (df, dg) in enumerate(zip(self.df, self.dg)):
            gamma = weights[:, i : i + 1]
            following.addcmul_(df, gamma)
            if tau is not None:
                following.addcmul_(dg, gamma * (tau - 1))
        return following

    def skip(self) -> None:
        self.slot = (self.slot + 1) % len(self.dg)

    def subset(self, source: Tensor) -> Anderson:
        part = copy.copy(self)
        part.df = [select_rows(d, source) for d in self.df]
        part.dg = [select_rows(d, source) for d in self.dg]
        for name in ("gram", "rhs", "last_f", "last_g"):
            setattr(part, name, select_rows(getattr(self, name), source))
        return part

    def inverse_transpose(self, vector: Tensor) -> Tensor:
        """v + DG (DG^T DG)^{-1} (-DF)^T v: the transpose of g -> g - DF*gamma, which is the step."""
        along = torch.stack([vecdot(d, vector) for d in self.df], 1)
        weights = self._least_squares(along, None)
        estimate = vector.clone()
        for i, dg in enumerate(self.dg):
            estimate.addcmul_(dg, weights[:, i : i + 1], value=-1)
        return estimate

    def _remember(self, fz: Tensor, g: Tensor, fresh: Tensor | None) -> None:
        """Put the newest differences in the oldest slot; a fresh lane has none at all."""
        i = self.slot
        self.skip()
        torch.sub(fz, self.last_f, out=self.df[i])
        torch.sub(g, self.last_g, out=self.dg[i])
        if fresh is not None:
            lanes = fresh.squeeze(1).nonzero().squeeze(1)
            for history in (*self.df, *self.dg, self.gram, self.rhs):
                history.index_fill_(0, lanes, 0.0)
        row = torch.stack([vecdot(d, self.dg[i]) for d in self.dg], 1)  # (n, slots)
        self.gram[:, i, :] = row
        self.gram[:, :, i] = row
        # g has changed by dg_i, so DG^T g has changed by what was just computed, save for the new column.
        self.rhs = self.rhs + row
        self.rhs[:, i] = vecdot(self.dg[i], g)
        self.last_f, self.last_g = fz, g

    def _least_squares(self, rhs: Tensor, g: Tensor | None) -> Tensor:
        """gamma, (n, slots): DG^T DG gamma = rhs; where that fails, argmin |g - DG gamma|, or 0 without g."""
        if self.gram.shape[1] == 1:
            square = self.gram[:, 0] * (1 + self.ridge)
            return torch.where(square > 0, rhs / square, 0.0)
        scale = self.gram.diagonal(dim1=1, dim2=2).sqrt()  # (n, slots): lengths of the columns of DG
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        normal = self.gram * inverse.unsqueeze(1) * inverse.unsqueeze(2)
        normal.diagonal(dim1=1, dim2=2).fill_(1 + self.ridge)
        solution, info = torch.linalg.solve_ex(normal, (rhs * inverse).unsqueeze(-1))
        gamma = solution.squeeze(-1) * inverse
        failed = (info != 0) | ~torch.isfinite(gamma).all(-1)
        if failed.any():
            lanes = failed.nonzero().squeeze(1)
            gamma[lanes] = 0.0 if g is None else self._lstsq(lanes, g[lanes])
        return gamma

    def _lstsq(self, lanes: Tensor, g: Tensor) -> Tensor:
        """The same problem through an orthogonal factorisation; zeros where even that is not finite."""
        columns = torch.stack([d[lanes] for d in self.dg], 2)  # (n, D, slots)
        finite = torch.nan_to_num(columns, nan=0.0, posinf=0.0, neginf=0.0)
        rhs = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0).unsqueeze(-1)
        gamma = torch.linalg.lstsq(finite.cpu(), rhs.cpu(), driver="gelsd").solution.to(g.device).squeeze(-1)
        return torch.nan_to_num(gamma, nan=0.0, posinf=0.0, neginf=0.0)
