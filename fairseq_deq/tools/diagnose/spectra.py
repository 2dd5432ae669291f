"""The Jacobian of f at the equilibrium: radius by position, eigenvalues, singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...held import restrictable
from ...jacobian import JacobianSums, spectral_radius
from .subject import Layer

# A larger radius than this is worth a word.
LARGE_RADIUS = 5.0
# Positions of a row whose radius is estimated, and Arnoldi steps for each.
_PLACES, _STEPS = 24, 20
# Probed positions for each channel, so that the least squares behind the mean Jacobian are well determined.
_PROBED_PER_CHANNEL = 4
# A block of more channels is not made in full: it takes a product for each.
_WIDEST_BLOCK = 512


@dataclass(frozen=True)
class Spectra:
    """What the Jacobian is like.

    Attributes:
        places: positions in the block, (K,).
        radii: the largest spectral radius over the rows there, for each.
        mean_eigenvalues: of the mean Jacobian of a position, (real, imaginary).
        block_eigenvalues: of the Jacobian of single positions, by what is said of the position.
        singular_values: of the mean Jacobian, largest first.
        rank: of the preconditioner that the solves use; 0: none.
        norm: root of the mean square of an eigenvalue's bound: |Jbar|_F / sqrt(C).
    """

    places: list[int]
    radii: list[float]
    mean_eigenvalues: list[tuple[float, float]]
    block_eigenvalues: dict[str, list[tuple[float, float]]]
    singular_values: list[float]
    rank: int
    norm: float

    @property
    def largest(self) -> tuple[float, int]:
        """The largest radius, and its position."""
        value = max(self.radii)
        return value, self.places[self.radii.index(value)]


def measure_spectra(layer: Layer) -> Spectra:
    """Look at the Jacobian.

    Args:
        layer: the layer at a block of text.
    """
    places, radii = radii_by_position(layer)
    jacobian = _mean_jacobian(layer)
    singular = torch.linalg.svdvals(jacobian)
    known = layer.preconditioner
    return Spectra(
        places=places,
        radii=radii,
        mean_eigenvalues=_pairs(jacobian),
        block_eigenvalues=_blocks(layer),
        singular_values=singular.tolist(),
        rank=0 if known is None else known.left.shape[1],
        norm=float(singular.square().mean().sqrt()),
    )


def radii_by_position(layer: Layer) -> tuple[list[int], list[float]]:
    """Positions spread over the block, and the largest spectral radius over the rows at each.

    Args:
        layer: the layer at a block of text.
    """
    rows, length = layer.state.shape[:2]
    places = torch.linspace(0, length - 1, min(length, _PLACES)).round().long()
    f, chosen = layer.f, places.expand(rows, len(places))
    radius = spectral_radius(f, layer.state, steps=_STEPS, positions=chosen).value
    return places.tolist(), torch.nan_to_num(radius, nan=float("inf")).amax(0).tolist()


def _mean_jacobian(layer: Layer) -> Tensor:
    """Jbar, (C, C), of the channels that the solve works on."""
    known = layer.preconditioner
    channels = layer.state.shape[-1] if known is None else known.width
    total: JacobianSums | None = None
    for seed in range(64):
        sums = JacobianSums.probed(layer.f, layer.state, channels, None, seed)
        if total is not None:
            sums = JacobianSums(
                total.gram + sums.gram, total.cross + sums.cross, total.positions + sums.positions
            )
        total = sums
        if total.positions >= _PROBED_PER_CHANNEL * channels:
            break
    assert total is not None
    return torch.nan_to_num(total.mean_jacobian())


def _blocks(layer: Layer) -> dict[str, list[tuple[float, float]]]:
    """Eigenvalues of the blocks of the positions that took most, fewest and a middling number."""
    width = layer.state.shape[-1]
    if width > _WIDEST_BLOCK or layer.result.lane_nfe.numel() != layer.positions:
        return {}
    order = layer.result.lane_nfe.flatten().argsort(stable=True)
    chosen = {"easiest": order[0], "middling": order[len(order) // 2], "hardest": order[-1]}
    found = {}
    for name, row in chosen.items():
        place = row.reshape(1)
        own = layer.state.reshape(-1, width).index_select(0, place)
        block = restrictable(layer.f).restrict(layer.state, place, None)
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(block, own).reshape(width, width)
        if bool(torch.isfinite(jacobian).all()):
            found[name] = _pairs(jacobian)
    return found


def _pairs(matrix: Tensor) -> list[tuple[float, float]]:
    values = torch.linalg.eigvals(matrix.double())
    return list(zip(values.real.tolist(), values.imag.tolist()))
