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
        max_evals: largest number of evaluations of f.
        rtol, atol: relative and absolute tolerance.
        memory: number of states that Anderson acceleration uses, at least 2.
        damping: step length in (0, 1].
    """

    solver: str
    max_evals: int
    rtol: float
    atol: float
    memory: int
    damping: float

    def within_reach(self, dtype: torch.dtype) -> SolveOptions:
        """The same, with a tolerance that f can reach in spite of rounding in `dtype`."""
        eps = torch.finfo(dtype).eps
        rtol = max(self.rtol, eps) if self.rtol else 0.0
        atol = self.atol if self.rtol else max(self.atol, eps)
        return SolveOptions(self.solver, self.max_evals, rtol, atol, self.memory, self.damping)


@dataclass(frozen=True)
class ModelOptions:
    """The options of a model, with the names of fairseq_deq's options where it has them.

    Attributes:
        family: `transformer` or `trellisnet`.
        vocab_size, pad: number of symbols, and the number of the padding symbol.
        embed_dim, embed_scale: channels of an embedding, and the factor of all embeddings.
        window: number of tokens that each injection is made of.
        ffn_dim, heads, head_dim, pre_norm, closing_norm, local_size: sizes and forms of a Transformer.
        activation, gated_ffn, norm, norm_affine, input_residual, positions: likewise; see `TransformerLayer`.
        layers: number of layers in f.
        hidden_dim, output_dim, kernel_size: sizes of a TrellisNet.
        adaptive_input_cutoff, adaptive_input_factor: bands of the embedding; no cut-offs: one table.
        adaptive_softmax_cutoff, adaptive_softmax_factor: likewise of the softmax.
        tie_softmax: the softmax uses the weights of the embedding; with bands, those of their words.
        tie_projections: with bands, the softmax uses their projections too.
        output_bias: every word, and every band, has a bias in the softmax.
        softmax_projection: with bands, the features are multiplied by a matrix before the head.
        preconditioner_rank: rank of P - I; 0: there is no preconditioner.
        learned_start: solves start at an affine map of the embeddings of the last two tokens.
        f_solver, f_thres, f_eps, stop_mode, f_memory, f_damping, solver_scope: of the solve.
        subseq_len: number of positions solved at a time; 0: 1024.
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
        """The options of a solve.

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
