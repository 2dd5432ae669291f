"""Anderson acceleration: the history of each position, and the step.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Ridge of the least squares, relative to the squared norms of its columns.
RIDGE = 1e-3
# Where positions depend on each other, the ridge of a difference grows by this factor with each iteration of
# its age, up to this bound.
GROWTH, MOST_RIDGE = 10.0, 1.0


class History:
    """Anderson acceleration of n rows: z' = z - DZ*gamma + tau*P (g - DG*gamma), where g = f(z) - z.

    DZ and DG are the differences of the last states and of their g, and gamma = argmin |g - DG*gamma|, with a
    small ridge. P is the preconditioner and tau the step length; the caller applies both.

    Args:
        like: states, (n, C).
        slots: number of differences to keep.
        coupled: whether the rows depend on each other.
    Source: Anderson (1965); Walker and Ni (2011).
    """

    def __init__(self, like: Tensor, slots: int, coupled: bool) -> None:
        ages = torch.arange(slots, dtype=torch.float64, device=like.device)
        growth = GROWTH if coupled else 1.0
        self.ridges = (RIDGE * growth**ages).clamp(max=MOST_RIDGE)  # by age
        self.count, self.slots = 0, slots
        self.dz: list[Tensor | None] = [None] * slots
        self.dg: list[Tensor | None] = [None] * slots
        self.gram = like.new_zeros(like.shape[0], slots, slots, dtype=torch.float64)  # DG^T DG
        self.rhs = like.new_zeros(like.shape[0], slots, dtype=torch.float64)  # DG^T g
        self.last: tuple[Tensor, Tensor] | None = None

    def skip(self) -> None:
        """Count an iteration in which no row moves."""
        self.count += 1

    def observe(self, z: Tensor, g: Tensor, forget: Tensor) -> Tensor | None:
        """Store the newest differences in the place of the oldest ones.

        Args:
            z, g: the states and their g, (n, C).
            forget: rows whose older differences are dropped, (n,) bool.
        Returns:
            the inner products <DG_j, DG_new> for all j and, last, <DG_new, g>, (n, slots + 1); None at the
            first call.
        """
        if self.last is None:
            return None
        i = self.count % self.slots
        self.dz[i], self.dg[i] = z - self.last[0], g - self.last[1]
        if bool(forget.any()):
            kept = ~forget
            for history in (self.dz, self.dg):
                history[:] = [None if d is None else torch.where(kept.unsqueeze(1), d, 0.0) for d in history]
            self.gram, self.rhs = self.gram * kept.view(-1, 1, 1), self.rhs * kept.view(-1, 1)
        new = self.dg[i]
        assert new is not None
        products = [torch.zeros_like(g[:, 0]) if d is None else torch.linalg.vecdot(d, new) for d in self.dg]
        return torch.stack([*products, torch.linalg.vecdot(new, g)], 1).double()

    def mix(self, products: Tensor | None, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """g - DG*gamma and z - DZ*gamma, (n, C) each.

        Args:
            products: what `observe` returned.
            z, g: as for `observe`.
        """
        self.last = (z, g)
        if products is None:
            return g, z
        i = self.count % self.slots
        self.count += 1
        row = products[:, :-1]
        self.gram, self.rhs = self.gram.clone(), self.rhs + row  # the new g is the old one plus DG_i
        self.gram[:, i], self.gram[:, :, i] = row, row
        self.rhs[:, i] = products[:, -1]
        square = self.gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)  # 1 / lengths of the columns
        system = self.gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        ages = [(i - j) % self.slots for j in range(self.slots)]
        system.diagonal(dim1=1, dim2=2).copy_(1 + self.ridges[ages])
        gamma = torch.linalg.solve_ex(system, self.rhs * scale)[0] * scale
        gamma = torch.where(torch.isfinite(gamma).all(1, keepdim=True), gamma, 0.0).to(z.dtype)
        for j, (dz, dg) in enumerate(zip(self.dz, self.dg)):
            if dz is not None and dg is not None:
                weight = gamma[:, j, None]
                z, g = torch.addcmul(z, dz, weight, value=-1), torch.addcmul(g, dg, weight, value=-1)
        return g, z
