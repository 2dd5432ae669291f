"""GMRES for affine f, as the adjoint of a fixed point is: one Krylov space per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import SolverConfig
from .lanes import LaneLayout
from .registry import register_linear_solver
from .result import FixedPoint, Status

_DEFAULT_MEMORY = 30


@register_linear_solver("gmres")
@torch.no_grad()
def gmres(f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> FixedPoint:
    """Restarted GMRES for z = f(z), with f(z) = J z + c: minimises |c - (I - J) z| over a Krylov space.

    A cycle keeps one basis vector per evaluation, at most `memory` (30 where that is 0), and then starts
    again from the best state. The residual that is reported was evaluated, not estimated.

    Args:
        f: an affine map of a tensor to one of the same shape.
        z0: starting state, (..., C); dimension 0 indexes independent samples. From zero it costs one
            evaluation less.
        config: budget, tolerance, memory; scope `sample` or `batch`.
    Returns:
        the `FixedPoint`; a lane is a sample (or the batch).
    Raises:
        ValueError: scope is `position`: the positions of a sample share one Krylov space.
    Source: Saad and Schultz (1986), SIAM J. Sci. Stat. Comput. 7, 856-869.
    """
    if config.scope == "position":
        raise ValueError("solver gmres solves whole samples: scope must be one of sample, batch")
    return _Cycles(f, z0, config).run()


class _Cycles:
    """The state of one solve; rows are samples."""

    def __init__(self, f: Callable[[Tensor], Tensor], z0: Tensor, config: SolverConfig) -> None:
        self.f, self.config, self.dtype = f, config, z0.dtype
        self.lanes = LaneLayout.of(z0, config.scope)
        z = self.lanes.flatten(z0.detach())
        self.z = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).clone()  # (n, N)
        self.evaluations = 0
        self.memory = config.memory or _DEFAULT_MEMORY

    def run(self) -> FixedPoint:
        budget, started_at_zero = self.config.max_evals, not bool(self.z.any())
        best, fz = self.z, self._call(self.z)
        constant = fz
        distance, residual, passed = self._measure(self.z, fz)
        first, moving, evaluations = distance, ~passed & torch.isfinite(distance), torch.ones_like(distance)
        stalled = torch.zeros_like(passed)
        if not started_at_zero and bool(moving.any()) and self.evaluations < budget:
            constant = self._call(torch.zeros_like(self.z))
            evaluations += moving
        # The last evaluation of a cycle measures its outcome, so a cycle needs two at least.
        while bool(moving.any()) and budget - self.evaluations >= 2:
            steps = min(self.memory, budget - self.evaluations - 1)
            candidate, taken = self._cycle(best, fz - best, constant, moving, steps)
            f_candidate = self._call(candidate)
            new_distance, new_residual, passed = self._measure(candidate, f_candidate)
            evaluations += moving * (taken + 1)
            better = moving & (new_distance < distance)
            stalled |= moving & ~passed & ~(new_distance < 0.9 * distance)
            best = torch.where(better.unsqueeze(1), candidate, best)
            fz = torch.where(better.unsqueeze(1), f_candidate, fz)
            distance = torch.where(better, new_distance, distance)
            residual = torch.where(better, new_residual, residual)
            moving = moving & ~passed & ~stalled
        converged = distance <= self._limit(fz)
        status = torch.full_like(distance, Status.MAX_ITER, dtype=torch.uint8)
        status[stalled] = Status.STALLED
        status[~torch.isfinite(first)] = Status.NON_FINITE
        status[converged] = Status.CONVERGED
        return FixedPoint(
            state=self.lanes.unflatten(best).to(self.dtype),
            residual=residual,
            lane_nfe=evaluations.to(torch.int32),
            status=status,
            nfe=self.evaluations,
            total_lane_nfe=self.evaluations * self.lanes.full[:-1].numel(),
        )

    def _cycle(
        self, z: Tensor, r: Tensor, constant: Tensor, moving: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """The state of least residual in z + Krylov space of r, and the evaluations each sample had use of.

        With V the orthonormal basis and (I - J) V_k = V_{k+1} H, the state is z + V_k y,
        y = argmin ||r| e_1 - H y|.
        """
        n = r.shape[0]
        beta = torch.linalg.vector_norm(r, dim=1)  # (n,)
        safe = torch.where(moving & (beta > 0), beta, torch.ones_like(beta)).unsqueeze(1)
        basis = [torch.where(moving.unsqueeze(1), r / safe, torch.zeros_like(r))]
        hessenberg = torch.zeros(n, steps + 1, steps, dtype=torch.float64)
        rhs = torch.zeros(n, steps + 1, 1, dtype=torch.float64)
        rhs[:, 0, 0] = beta.masked_fill(~moving, 0.0).cpu()  # the small systems are solved on the CPU
        taken = torch.zeros_like(beta)
        limit = self._limit(z + r).double().cpu()
        y = torch.zeros(n, steps, 1, dtype=torch.float64)
        going = moving.cpu().clone()  # a sample that is done keeps its y, whatever the others still need
        for k in range(steps):
            w = basis[k] - (self._call(basis[k]) - constant)
            known = torch.stack(basis, 1)  # (n, k+1, N)
            for _ in range(2):  # twice is enough to keep the basis orthogonal
                along = torch.bmm(known, w.unsqueeze(-1))  # (n, k+1, 1)
                w = torch.baddbmm(w.unsqueeze(1), along.transpose(1, 2), known, alpha=-1).squeeze(1)
                hessenberg[:, : k + 1, k] += along.squeeze(-1).cpu()
            length = torch.linalg.vector_norm(w, dim=1)
            hessenberg[:, k + 1, k] = length.cpu()
            taken += going.to(taken)
            part = hessenberg[:, : k + 2, : k + 1]
            least = torch.linalg.lstsq(_finite(part), rhs[:, : k + 2], driver="gelsd").solution  # (n, k+1, 1)
            y[going, : k + 1] = least[going]
            estimate = torch.linalg.vector_norm(rhs[:, : k + 2] - part @ least, dim=(1, 2))
            # The size of the state goes by its part in the Krylov space, whose basis is orthonormal.
            size = torch.linalg.vector_norm(least, dim=(1, 2)) * self.config.rtol
            going &= ~(estimate <= 0.9 * torch.maximum(limit, size))
            if k + 1 == steps or not bool(going.any()):
                break
            basis.append((w / length.unsqueeze(1)).masked_fill((length == 0).unsqueeze(1), 0.0))
        step = torch.bmm(y[:, : len(basis)].transpose(1, 2).to(r), torch.stack(basis, 1)).squeeze(1)
        good = moving & torch.isfinite(step).all(1)
        return torch.where(good.unsqueeze(1), z + step, z), taken

    def _call(self, z: Tensor) -> Tensor:
        self.evaluations += 1
        return self.lanes.flatten(self.f(self.lanes.unflatten(z).to(self.dtype))).to(self.z.dtype)

    def _limit(self, fz: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(fz, dim=1)
        return self.config.atol * fz.shape[1] ** 0.5 + self.config.rtol * size

    def _measure(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|f(z) - z| and that relative to |f(z)|, inf where not finite, and whether it is good enough."""
        distance = torch.linalg.vector_norm(fz - z, dim=1)
        finite = torch.isfinite(distance)
        size = torch.linalg.vector_norm(fz, dim=1).clamp(min=1e-30)
        residual = torch.where(finite, distance / size, float("inf"))
        return torch.where(finite, distance, float("inf")), residual, finite & (distance <= self._limit(fz))


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
