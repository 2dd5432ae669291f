"""The layers of both families, bound to injections, and what solves may know of them beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fairseq_deq.jacobian import JacobianSums
from fairseq_deq.layers.transformer.layer import TransformerLayer
from fairseq_deq.layers.transformer.whole import BoundTransformer
from fairseq_deq.layers.trellis.layer import TrellisLayer
from fairseq_deq.layers.trellis.whole import BoundTrellis
from fairseq_deq.layers.weight_norm import Initializer
from fairseq_deq.models.learned import LearnedStart
from fairseq_deq.solvers import Preconditioner, SolverConfig, solve

B, T, M, C, HEADS, D = 3, 20, 5, 12, 2, 6
HIDDEN, LARGEST_BATCH = 8, 12


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers, the same in every precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@cache
def _settled(dtype: torch.dtype) -> list[Tensor]:
    """States and injections of the positions before a segment; those of the first 3 rows come first."""
    generator = torch.Generator().manual_seed(3)
    parts: list[list[Tensor]] = [[], []]
    for rows in (B, LARGEST_BATCH - B):
        for part, width in zip(parts, (C, 3 * HEADS * D)):
            part.append(torch.randn(rows, M, width, generator=generator, dtype=torch.float64).to(dtype))
    return [torch.cat(part) for part in parts]


def transformer(
    injection: Tensor, gain: float, padding: Tensor | None = None, attention: float = 1.0
) -> BoundTransformer:
    """A Transformer's f over (B', T', C), with 5 settled positions before it.

    Args:
        injection: the first rows of a batch, (B', T', 36); all else that is random is the same for each.
        gain: standard deviation of the weights.
        padding: (B', T') bool; None: there is none.
        attention: factor of what attention gives; the larger, the less the state speaks for itself.
    """
    rows, length = injection.shape[:2]
    past, past_injection = _settled(injection.dtype)
    cell = _transformer_layer(gain, attention, injection.dtype)
    prepared = cell.prepare(cell.draw(rows, length, M, injection))
    hidden = None if padding is None else torch.nn.functional.pad(padding, (M, 0), value=False)
    return prepared.bind(injection, prepared.context(past[:rows], past_injection[:rows], None), hidden)


@cache
def _transformer_layer(gain: float, attention: float, dtype: torch.dtype) -> TransformerLayer:
    torch.manual_seed(4)
    cell = TransformerLayer(
        dim=C,
        ffn_dim=16,
        heads=HEADS,
        head_dim=D,
        pre_norm=False,
        weight_norm=True,
        dropout=0.0,
        attention_dropout=0.0,
        local_size=0,
    )
    cell.initialize(Initializer("normal", gain, 1.0))
    with torch.no_grad():
        cell.out.weight_g.mul_(attention)
    return cell.to(dtype)


def trellis(injection: Tensor, gain: float, padding: Tensor | None = None) -> BoundTrellis:
    """A TrellisNet's f over (B', T', 2*8), at the beginning of a text; arguments as for `transformer`."""
    rows, length = injection.shape[:2]
    cell = _trellis_layer(gain, injection.dtype)
    return cell.prepare(cell.draw(rows, length, 0, injection)).bind(injection, None, padding)


@cache
def _trellis_layer(gain: float, dtype: torch.dtype) -> TrellisLayer:
    torch.manual_seed(4)
    cell = TrellisLayer(
        hidden_dim=HIDDEN, output_dim=4, kernel_size=2, weight_norm=True, dropout=0.0, weight_dropout=0.0
    )
    cell.initialize(Initializer("normal", gain, 1.0))
    return cell.to(dtype)


@dataclass(frozen=True)
class Family:
    """A layer as a solve sees it.

    Attributes:
        name: of the layer and the scope.
        binds: from injections and padding to f, of a layer with which hardly a lane converges, and of one
            with which most do.
        injection_dim, state_dim, unknowns: channels of u, of z, and of what is solved for.
        scope: of the solve.
    """

    name: str
    binds: tuple[Callable[..., Any], Callable[..., Any]]
    injection_dim: int
    state_dim: int
    unknowns: int
    scope: str

    def injection(self, dtype: torch.dtype, length: int = T) -> Tensor:
        return draw(B, length, self.injection_dim, seed=2, dtype=dtype)


_TRELLISES = partial(trellis, gain=2.0), partial(trellis, gain=0.4)
FAMILIES = (
    Family(
        "transformer",
        (partial(transformer, gain=0.6), partial(transformer, gain=0.1, attention=30.0)),
        3 * HEADS * D,
        C,
        C,
        "position",
    ),
    Family("trellis", _TRELLISES, 4 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, "position"),
    Family("recurrence", _TRELLISES, 4 * HIDDEN, 2 * HIDDEN, HIDDEN, "recurrence"),
)


@dataclass(frozen=True)
class Known:
    """P and the start of one layer, learned from a solve of other injections than those of the tests."""

    preconditioner: Preconditioner
    start: LearnedStart

    @classmethod
    @torch.no_grad()
    def of(cls, family: Family, which: int, dtype: torch.dtype) -> Known:
        u = draw(LARGEST_BATCH, T, family.injection_dim, seed=9, dtype=dtype)
        f = family.binds[which](u)
        z = solve(
            f, u.new_zeros(*u.shape[:2], family.state_dim), SolverConfig(max_evals=40, scope=family.scope)
        ).state
        mean = JacobianSums.probed(f, z, family.unknowns).mean_jacobian()
        start = LearnedStart(family.injection_dim, family.state_dim).to(dtype)
        start.collect(u, z, torch.ones(u.shape[:2], dtype=torch.bool))
        start.renew()
        assert float(mean.norm()) > 0.1
        assert float(start.weight.norm()) > 0.1
        return cls(Preconditioner.from_jacobian(mean, 6), start)
