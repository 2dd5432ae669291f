"""The Jacobian of f at its fixed point: a penalty on its size, its mean over positions, its radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .held import restrictable
from .solvers.lanes import LaneLayout


def jacobian_penalty(fz: Tensor, z: Tensor, probes: int = 1, real: Tensor | None = None) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 / n, J = dfz/dz, n the numbers in z: mean of (J^T v)^2, v ~ N(0, I).

    It has a gradient with respect to everything that fz depends on, with z held fixed.

    Args:
        fz: f(z) with its graph, (..., C).
        z: the tensor that f was evaluated at, which requires a gradient.
        probes: number of vectors v to average over.
        real: (...) bool, False at positions that count neither in J nor in n; None: all count.
    Returns:
        the estimate, a scalar in float32 at least; 0 where no position is real.
    Raises:
        ValueError: `fz` does not depend on `z`, or no probe is asked for.
    Source: Hutchinson (1990); Bai, Koltun, Kolter (2021, arXiv 2106.14342), equation 4, whose division by the
        width alone is that of one position; here it is the mean over positions too.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if fz.grad_fn is None or not z.requires_grad:
        raise ValueError("the Jacobian penalty needs f(z) with its graph, and a z that requires a gradient")
    counted = None if real is None else real.unsqueeze(-1).expand_as(z)
    total = _widened(z.new_zeros(()))
    for _ in range(probes):
        v = torch.randn_like(fz)
        if counted is not None:
            v = v.masked_fill(~counted, 0.0)
        # Autocast would round what it finds in the backward pass of a graph that needs none of it.
        with torch.autocast(z.device.type, enabled=False):
            square = _widened(_vjp(fz, z, v, create_graph=True)).square()
        if counted is not None:
            square = square.masked_fill(~counted, 0.0)
        total = total + square.sum()
    n = z.numel() if counted is None else counted.sum().clamp(min=1)
    return total / n / probes


@dataclass(frozen=True)
class PenaltySchedule:
    """The weight of the Jacobian penalty, by the number of finished updates.

    Attributes:
        weight: weight in the loss at first.
        frequency: share of the updates that compute it, in [0, 1].
        increment_every: updates after which the weight grows by 0.1, each time; 0 for never.
        start: number of first updates that do not use it.
    """

    weight: float = 0.0
    frequency: float = 1.0
    increment_every: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and at least 0, got {self.weight!r}")
        if not 0 <= self.frequency <= 1:
            raise ValueError(f"frequency must be in [0, 1], got {self.frequency!r}")
        if self.increment_every < 0:
            raise ValueError(f"increment_every must be at least 0, got {self.increment_every!r}")

    def at(self, update: int) -> float:
        """The weight in the update after `update` finished ones; 0 in those that leave the penalty out.

        The same on every worker and in a resumed run: the draw depends on the number of the update alone.
        """
        increments = max(update - self.start, 0) // self.increment_every if self.increment_every else 0
        weight = self.weight + 0.1 * increments
        if weight == 0 or update < self.start:
            return 0.0
        lot = torch.rand((), generator=torch.Generator().manual_seed(update)).item()
        return weight if lot < self.frequency else 0.0


# Probes look at every eighth position, so that what they change hardly meets, and at those half-way between.
_PROBE_STRIDE, _PROBES = 8, 2
# Ridge of their least squares, relative to their mean square.
_PROBE_RIDGE = 1e-3


@dataclass(frozen=True)
class JacobianSums:
    """Sums over positions t from which the mean of the blocks J_tt = df_t/dz_t follows by least squares.

    Attributes:
        gram: sum of d d^T over small changes d of the state of a position, (C, C), in float64.
        cross: sum of d (f_t(z + d) - f_t(z))^T, likewise.
        positions: their number.
    """

    gram: Tensor
    cross: Tensor
    positions: Tensor

    @classmethod
    @torch.no_grad()
    def probed(
        cls,
        f: Callable[[Tensor], Tensor],
        z: Tensor,
        channels: int,
        real: Tensor | None = None,
        seed: int = 0,
        length: float = 1e-2,
    ) -> JacobianSums:
        """The sums at z, from five evaluations of f: the state of some positions is changed a little.

        Args:
            f: map of a tensor to one of the same shape, (B, T, C').
            z: the point, usually a fixed point.
            channels: number of leading channels to use, C.
            real: (B, T) bool; the other positions do not count. None: all do.
            seed: of the random changes, which are the same on every device.
            length: of a change, relative to the state; well above the rounding of f.
        """
        generator = torch.Generator().manual_seed(seed)
        gram = torch.zeros(channels, channels, dtype=torch.float64, device=z.device)
        cross, positions = torch.zeros_like(gram), torch.zeros_like(gram[0, 0])
        base = f(z)
        stride = min(_PROBE_STRIDE, z.shape[1])
        for _ in range(_PROBES):
            noise = torch.randn(*z.shape[:-1], channels, generator=generator).to(z)
            size = torch.linalg.vector_norm(z[..., :channels], dim=-1, keepdim=True)
            change = noise * size.clamp(min=1e-3) * (length / channels**0.5)
            for offset in {0, stride // 2}:
                chosen = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
                chosen[:, offset::stride] = True
                moved = z.clone()
                moved[..., :channels] += change * chosen.unsqueeze(-1)
                counted = chosen if real is None else chosen & real
                d = change[counted].double()
                df = (f(moved) - base)[..., :channels][counted].double()
                sound = torch.isfinite(df).all(1, keepdim=True)
                positions += sound.sum()
                d, df = d * sound, torch.where(sound, df, 0.0)
                gram += d.T @ d
                cross += d.T @ df
        return cls(gram, cross, positions)

    def mean_jacobian(self) -> Tensor:
        """Jbar, (C, C): argmin sum |df - Jbar d|^2, with a small ridge."""
        scale = _PROBE_RIDGE * self.gram.diagonal().mean()
        ridge = scale * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        solution, _ = torch.linalg.solve_ex(self.gram + ridge, self.cross)
        return solution.T


@dataclass(frozen=True)
class SpectralRadius:
    """Largest |eigenvalue| of a Jacobian, one for each block or system.

    Attributes:
        value: the estimates, NaN where f is not finite. With fewer steps than dimensions and a normal J they
            are bounds from below.
        error: |J' - J| of the nearest J' that has this eigenvalue exactly, as a spectral norm, at most; for a
            normal J some eigenvalue is as near as that. 0 says that nothing was left out.
        steps: Arnoldi steps taken.
    """

    value: Tensor
    error: Tensor
    steps: int


def spectral_radius(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    scope: str = "position",
    steps: int = 20,
    positions: Tensor | None = None,
) -> SpectralRadius:
    """rho(J) = max |eigenvalue| of J = df/dz at z, by Arnoldi's method on J^T.

    Unlike the quotients of a power iteration, Arnoldi's Ritz values are right for rotations, and exact for
    any J once there are as many steps as dimensions. In `position` scope the blocks J_tt of single
    positions are taken one by one. The Jacobian of a causal f is block triangular, so its eigenvalues are
    those of these blocks, and the largest radius of a sample's positions is that of the whole sample; asked
    for in `sample` scope, it needs many more steps, since the coupling of positions is far from normal.

    Args:
        f: map of a tensor to one of the same shape, (B, ..., C). In position scope one that is `Restrictable`
            is evaluated at single positions; any other at all of them, for each that is looked at.
        z: the point, usually a fixed point.
        scope: `position`, the blocks J_tt, result (B, ...); `sample`, all of J of each sample, (B,).
        steps: Arnoldi steps, each a vector-Jacobian product.
        positions: (B, K), K positions of each sample (flat within the sample), for which alone the blocks are
            taken, result (B, K); None: all. Only in position scope.
    Returns:
        the `SpectralRadius`, in float32 at least.
    Raises:
        ValueError: unknown scope, too few steps, or positions in `sample` scope.
    Source: Arnoldi (1951); Saad, Numerical Methods for Large Eigenvalue Problems (2011), section 6.2.
    """
    if scope not in ("position", "sample"):
        raise ValueError(f"scope must be one of position, sample; got {scope!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if positions is not None and scope == "sample":
        raise ValueError("positions can be chosen in scope position only")
    lanes = LaneLayout.of(z, scope)
    z = z.detach()
    if positions is None and (scope == "sample" or lanes.count == lanes.samples):
        return _reshaped(_arnoldi(*_taped(f, z), lanes.count, steps), lanes.shape)
    width = lanes.count // lanes.samples
    shape = lanes.shape if positions is None else positions.shape
    if positions is None:
        positions = torch.arange(width, device=z.device).expand(lanes.samples, width)
    first = torch.arange(lanes.samples, device=z.device) * width
    blocks, at_some = [], restrictable(f)
    for column in positions.unbind(1):  # one position of every sample at a time: their blocks do not touch
        rows = first + column
        own = z.reshape(-1, lanes.width).index_select(0, rows)
        blocks.append(_arnoldi(*_taped(at_some.restrict(z, rows, None), own), lanes.samples, steps))
    value = torch.stack([b.value for b in blocks], 1)
    error = torch.stack([b.error for b in blocks], 1)
    return _reshaped(SpectralRadius(value, error, blocks[0].steps), shape)


def _reshaped(radius: SpectralRadius, shape: torch.Size) -> SpectralRadius:
    return SpectralRadius(radius.value.reshape(shape), radius.error.reshape(shape), radius.steps)


def _taped(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        return f(leaf), leaf


def _widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _vjp(fz: Tensor, leaf: Tensor, vector: Tensor, create_graph: bool = False) -> Tensor:
    if not fz.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(
        fz, leaf, vector.to(fz.dtype), retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(leaf) if product is None else product


@torch.no_grad()
def _arnoldi(fz: Tensor, leaf: Tensor, systems: int, steps: int) -> SpectralRadius:
    """Ritz values of `systems` independent rows, from the Krylov space of one random vector each."""
    like = _widened(leaf)
    size = leaf.numel() // systems
    steps = min(steps, size)
    basis = like.new_zeros(systems, steps + 1, size)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(systems, size, generator=generator, dtype=torch.float64)
    basis[:, 0] = (start / torch.linalg.vector_norm(start, dim=1, keepdim=True)).to(like)
    hessenberg = torch.zeros(systems, steps + 1, steps, dtype=torch.float64)
    for k in range(steps):
        w = _vjp(fz, leaf, basis[:, k].reshape(fz.shape)).reshape(systems, size).to(like)
        known = basis[:, : k + 1]  # (n, k+1, D)
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            along = torch.bmm(known, w.unsqueeze(-1))
            w = w - torch.bmm(along.transpose(1, 2), known).squeeze(1)
            hessenberg[:, : k + 1, k] += along.squeeze(-1).cpu()
        length = torch.linalg.vector_norm(w, dim=1)
        # Nothing new: the Krylov space is invariant, and its Ritz values are eigenvalues.
        column = torch.linalg.vector_norm(hessenberg[:, :, k], dim=1).to(like)
        gone = length <= 16 * torch.finfo(like.dtype).eps * column
        hessenberg[:, k + 1, k] = length.masked_fill(gone, 0.0).cpu()
        basis[:, k + 1] = (w / length.unsqueeze(1)).masked_fill(gone.unsqueeze(1), 0.0)
    return _ritz(hessenberg, steps, like)


def _ritz(hessenberg: Tensor, steps: int, like: Tensor) -> SpectralRadius:
    finite = torch.isfinite(hessenberg).flatten(1).all(1)
    hessenberg = torch.where(finite.view(-1, 1, 1), hessenberg, 0.0)
    values, vectors = torch.linalg.eig(hessenberg[:, :steps])
    size, which = values.abs().max(1)
    last = vectors[torch.arange(len(which)), steps - 1, which].abs()
    error = hessenberg[:, steps, steps - 1] * last
    value, error = (torch.where(finite, x, math.nan).to(like) for x in (size, error))
    return SpectralRadius(value, error, steps)
