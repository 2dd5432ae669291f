"""The second value that a decoder returns, beside its scores."""

from __future__ import annotations

from typing import TypedDict

from ..equilibrium import Equilibrium, SolveStats
from ..layers.memory import Memory
from .stability import JacobianPenalty, PositionSpectralRadii


class DecoderExtra(TypedDict):
    """A plain dictionary, as fairseq's search asks for, with these entries.

    Attributes:
        attn: always None; part of fairseq's interface.
        equilibria: one for each subsequence; empty where nothing had to be solved.
        forward_stats: sums over the forward solves.
        backward_stats: sums over the linear solves; the backward pass fills them in.
        memory: the memory to hand to the next segment; None if nothing is remembered.
        jacobian_penalty: in training, where one is added to the loss; else None.
        spectral_radii: in evaluation, where `--spectral-radius` asks for them; else None.
    """

    attn: None
    equilibria: list[Equilibrium]
    forward_stats: SolveStats
    backward_stats: SolveStats
    memory: Memory | None
    jacobian_penalty: JacobianPenalty | None
    spectral_radii: PositionSpectralRadii | None


def decoder_extra(
    equilibria: list[Equilibrium],
    stats: tuple[SolveStats, SolveStats],
    memory: Memory | None = None,
    jacobian_penalty: JacobianPenalty | None = None,
    spectral_radii: PositionSpectralRadii | None = None,
) -> DecoderExtra:
    """The dictionary with these entries; `stats` are those of the forward and of the linear solves."""
    return {
        "attn": None,
        "equilibria": equilibria,
        "forward_stats": stats[0],
        "backward_stats": stats[1],
        "memory": memory,
        "jacobian_penalty": jacobian_penalty,
        "spectral_radii": spectral_radii,
    }
