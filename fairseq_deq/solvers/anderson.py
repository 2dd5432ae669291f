"""Anderson acceleration, one small least-squares problem a lane."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SolverConfig
from .registry import register_solver, select_rows


@register_solver("anderson")
class Anderson:
    """Type-II Anderson acceleration in its difference form.

    With g_k = f(z_k) - z_k, DG = [g_k - g_{k-1}, ...] and DZ alike, over the last `memory` states:
    gamma = argmin |g_k - DG*gamma|, z_{k+1} = z_k + tau*g_k - (DZ + tau*DG)*gamma.

    The least squares is solved through its Gram matrix, columns scaled to length one, with a relative
    ridge, in float32 or better; lanes for which that fails are solved by `lstsq`.
    Anderson (1965); Walker and Ni (2011).
    """

    default_memory = 3

    def __init__(self, config: SolverConfig, like: Tensor) -> None:
        n, dim = like.shape
        self.ridge = config.ridge
        self.slots = (config.memory or self.default_memory) - 1
        self.slot = 0
        self.dz = like.new_zeros(n, self.slots, dim)
        self.dg = like.new_zeros(n, self.slots, dim)
        self.gram = like.new_zeros(n, self.slots, self.slots)  # DG^T DG
        self.last_z = like.new_zeros(n, dim)
        self.last_g = like.new_zeros(n, dim)

    def step(self, z: Tensor, fz: Tensor, fresh: Tensor | None, tau: Tensor) -> Tensor:
        g = fz - z  # (n, D)
        self._remember(z, g, fresh)
        rhs = torch.matmul(self.dg, g.unsqueeze(-1)).squeeze(-1)  # (n, slots)
        gamma = self._least_squares(rhs, g).unsqueeze(1)  # (n, 1, slots)
        plain = torch.addcmul(z, g, tau)
        correction = torch.bmm(gamma, self.dz).squeeze(1)
        correction.addcmul_(torch.bmm(gamma, self.dg).squeeze(1), tau)
        return plain.sub_(correction)

    def select(self, source: Tensor) -> None:
        for name in ("dz", "dg", "gram", "last_z", "last_g"):
            setattr(self, name, select_rows(getattr(self, name), source))

    def _remember(self, z: Tensor, g: Tensor, fresh: Tensor | None) -> None:
        """Put the newest differences in the oldest slot; a fresh lane has none at all."""
        i = self.slot
        self.slot = (i + 1) % self.slots
        self.dz[:, i] = z - self.last_z
        self.dg[:, i] = g - self.last_g
        if fresh is not None:
            for history in (self.dz, self.dg, self.gram):
                history.masked_fill_(fresh.unsqueeze(-1), 0)
        row = torch.matmul(self.dg, self.dg[:, i].unsqueeze(-1)).squeeze(-1)  # (n, slots)
        self.gram[:, i, :] = row
        self.gram[:, :, i] = row
        self.last_z = z.clone()
        self.last_g = g

    def _least_squares(self, rhs: Tensor, g: Tensor) -> Tensor:
        scale = self.gram.diagonal(dim1=1, dim2=2).sqrt()  # (n, slots): lengths of the columns of DG
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        normal = self.gram * inverse.unsqueeze(1) * inverse.unsqueeze(2)
        normal.diagonal(dim1=1, dim2=2).copy_(torch.full_like(scale, 1 + self.ridge))
        solution, info = torch.linalg.solve_ex(normal, (rhs * inverse).unsqueeze(-1))
        gamma = solution.squeeze(-1) * inverse
        failed = (info != 0) | ~torch.isfinite(gamma).all(-1)
        if failed.any():
            gamma = torch.where(failed.unsqueeze(-1), self._lstsq(g), gamma)
        return gamma

    def _lstsq(self, g: Tensor) -> Tensor:
        """The same problem through an orthogonal factorisation; zeros where even that is not finite."""
        finite = torch.nan_to_num(self.dg, nan=0.0, posinf=0.0, neginf=0.0).transpose(1, 2)
        rhs = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0).unsqueeze(-1)
        gamma = torch.linalg.lstsq(finite.cpu(), rhs.cpu(), driver="gelsd").solution.to(g.device).squeeze(-1)
        return torch.nan_to_num(gamma, nan=0.0, posinf=0.0, neginf=0.0)
