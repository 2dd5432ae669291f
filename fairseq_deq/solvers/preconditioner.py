"""An approximate inverse that all lanes share, applied in every step of a solve (the chord method)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..invariant_matmul import pad_rows


@dataclass(frozen=True)
class Preconditioner:
    """P = I + left right^T, close to (I - Jbar)^{-1} with Jbar the mean of the blocks dz'_t/dz_t of f.

    With g = f(z) - z, Newton's method steps by (I - J_t)^{-1} g at each position t. Where the blocks J_t of
    all positions share a part Jbar, one inverse computed in advance does much of that: z + P g (a chord, or
    simplified Newton, step). Anderson steps by z - DZ*gamma + P (g - DG*gamma), with gamma as without P:
    its history does not depend on P. P changes neither the fixed points nor when a solve stops.

    Its limits: P knows nothing of how the J_t differ, or of how positions are coupled. A bad P costs
    evaluations, never the result: a lane whose residual explodes restarts without it.

    Attributes:
        left, right: (C, r), C channels of a position, r the rank.
    Source: Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 5.4 (chord method).
    """

    left: Tensor
    right: Tensor

    @classmethod
    def from_jacobian(cls, jacobian: Tensor, rank: int, least: float = 0.0) -> Preconditioner:
        """P = I + U S (I - V^T U S)^{-1} V^T, with the `rank` largest singular values S of Jbar = U S V^T.

        Args:
            jacobian: Jbar, (C, C).
            rank: r, at most C.
            least: singular values of I - V^T U S are taken for this at least: where Jbar has an eigenvalue
                near 1, the inverse would send lanes far away.
        Returns:
            P, in the type of `jacobian`; the identity where Jbar is zero or not finite.
        """
        width = jacobian.shape[0]
        rank = min(rank, width)
        nothing = jacobian.new_zeros(width, rank)
        if rank == 0 or not bool(torch.isfinite(jacobian).all()):
            return cls(nothing, nothing)
        u, s, vh = torch.linalg.svd(jacobian.double())
        u, s, v = u[:, :rank], s[:rank], vh[:rank].T
        if float(s[0]) == 0.0:
            return cls(nothing, nothing)
        # U (S^{-1} - V^T U)^{-1} = U S (I - V^T U S)^{-1}, which has no 1/0.
        core = torch.eye(rank, dtype=s.dtype, device=s.device) - v.T @ (u * s)
        x, sizes, yh = torch.linalg.svd(core)
        left = u * s @ (yh.T / sizes.clamp(min=least)) @ x.T
        if not bool(torch.isfinite(left).all()):
            return cls(nothing, nothing)
        return cls(left.to(jacobian), v.contiguous().to(jacobian))

    @property
    def width(self) -> int:
        """Channels of a position, C."""
        return self.left.shape[0]

    @property
    def transposed(self) -> Preconditioner:
        """P^T, for the linear solve of the backward pass."""
        return Preconditioner(self.right, self.left)

    def leading(self, own: int) -> Preconditioner:
        """P of the first `own` channels, where the others do not act on them."""
        return Preconditioner(self.left[:own], self.right[:own])

    def to(self, like: Tensor) -> Preconditioner:
        """The same on the device and in the type of `like`."""
        return Preconditioner(self.left.to(like), self.right.to(like))

    def __call__(self, rows: Tensor) -> Tensor:
        """P of every position, (n, D) -> (n, D), D a multiple of C; a row depends on no other row."""
        positions = rows.reshape(-1, self.width)  # (n, C)
        padded = pad_rows(positions)  # (n', C)
        result = torch.addmm(padded, torch.mm(padded, self.right), self.left.T)
        return result[: positions.shape[0]].view_as(rows)
