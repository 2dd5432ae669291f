"""The options of an exported model, and of its solves.

Part of a model that fairseq_deq exported (MIT licence).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class SolveOptions:
    """Options of a solve; a position has converged when |f(z) - z| <= atol*sqrt(C) + rtol*|f(z)|.

    Attributes:
        solver: `anderson` or `picard`.
        max_evals: evaluations of f at most.
        rtol, atol: tolerance.
        memory: states that Anderson keeps, at least 2.
        damping: step length in (0, 1].
    """

    solver: str
    max_evals: int
    rtol: float
    atol: float
    memory: int
    damping: float

    def within_reach(self, dtype: torch.dtype) -> SolveOptions:
        """The same, with a tolerance that rounding lets f in `dtype` reach."""
        eps = torch.finfo(dtype).eps
        rtol = max(self.rtol, eps) if self.rtol else 0.0
        atol = self.atol if self.rtol else max(self.atol, eps)
        return SolveOptions(self.solver, self.max_evals, rtol, atol, self.memory, self.damping)


@dataclass(frozen=True)
class ModelOptions:
    """What a model is made of; the names of fairseq_deq's options, where it has them.

    Attributes:
        family: `transformer` or `trellisnet`.
        vocab_size, pad: words of the dictionary, and which of them is padding.
        embed_dim, embed_scale: channels of an embedding, and the factor of all.
        window: tokens that an injection is made of.
        ffn_dim, heads, head_dim, pre_norm, closing_norm, local_size: of a Transformer.
        activation, gated_ffn, norm, norm_affine, input_residual, positions: likewise; see
            `TransformerLayer`.
        layers: how many f has.
        hidden_dim, output_dim, kernel_size: of a TrellisNet.
        adaptive_input_cutoff, adaptive_input_factor: bands of the embedding; no cut-offs: a table.
        adaptive_softmax_cutoff, adaptive_softmax_factor: likewise of the softmax.
        tie_softmax: the softmax is the embedding; with bands their words are.
        tie_projections: of the bands, too.
        output_bias: every word, and every band, has a bias in the softmax.
        softmax_projection: the head of the bands sees the features through a matrix.
        preconditioner_rank: of P; 0: there is none.
        learned_start: solves start where a linear map of the last two tokens says.
        f_solver, f_thres, f_eps, stop_mode, f_memory, f_damping, solver_scope: of the solve.
        subseq_len: positions solved at a time; 0: 1024.
    """

    family: str = "transformer"
    vocab_size: int = 4
    pad: int = 1
    embed_dim: int = 2
    embed_scale: float = 1.0
    window: int = 1
    ffn_dim: int = 0
    heads: int = 1
    head_dim: int = 1
    pre_norm: bool = False
    closing_norm: bool = True
    activation: str = "relu"
    gated_ffn: bool = False
    norm: str = "layer"
    norm_affine: bool = False
    input_residual: bool = False
    positions: str = "relative"
    local_size: int = 0
    layers: int = 1
    hidden_dim: int = 0
    output_dim: int = 0
    kernel_size: int = 2
    adaptive_input_cutoff: tuple[int, ...] = ()
    adaptive_input_factor: float = 4.0
    adaptive_softmax_cutoff: tuple[int, ...] = ()
    adaptive_softmax_factor: float = 4.0
    tie_softmax: bool = False
    tie_projections: bool = False
    output_bias: bool = False
    softmax_projection: bool = False
    preconditioner_rank: int = 0
    learned_start: bool = False
    f_solver: str = "anderson"
    f_thres: int = 60
    f_eps: float = 1e-3
    stop_mode: str = "rel"
    f_memory: int = 5
    f_damping: float = 1.0
    solver_scope: str = "position"
    subseq_len: int = 0

    @classmethod
    def of(cls, config: Any) -> ModelOptions:
        """The options among the attributes of `config`."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            value = getattr(config, f.name)
            values[f.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    @property
    def solve(self) -> SolveOptions:
        """Those of a solve.

        Raises:
            ValueError: one is out of range; the sentence names it and the valid values.
        """
        for name, valid in (
            ("f_solver", ("anderson", "picard")),
            ("stop_mode", ("rel", "abs")),
            ("solver_scope", ("position", "recurrence") if self.family == "trellisnet" else ("position",)),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be {' or '.join(valid)}, got {getattr(self, name)!r}")
        if not (self.f_thres >= 1 and 0 < self.f_eps < 1 and 0 < self.f_damping <= 1 and self.f_memory >= 2):
            raise ValueError(
                "f_thres must be at least 1, f_eps in (0, 1), f_damping in (0, 1] and f_memory at least 2, "
                f"got {self.f_thres}, {self.f_eps}, {self.f_damping} and {self.f_memory}"
            )
        rtol, atol = (self.f_eps, 0.0) if self.stop_mode == "rel" else (0.0, self.f_eps)
        return SolveOptions(self.f_solver, self.f_thres, rtol, atol, self.f_memory, self.f_damping)
