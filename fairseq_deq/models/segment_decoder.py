"""The part of the decoder that embeds a segment of tokens and solves for its equilibrium."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor

from ..equilibrium import Equilibrium, SolveStats
from ..errors import OptionError
from ..implicit import GradientConfig, fixed_point, unroll
from ..layers.dropout import apply_mask, variational_mask
from ..layers.injection import Injection
from ..layers.layer import Layer, PreparedLayer, recorded
from ..layers.memory import Memory
from ..layers.weight_norm import Initializer
from ..options import is_on
from ..solve_report import report_solves
from ..solvers import SolverConfig
from .deq_config import DEQLanguageModelConfig, forward_solver, gradient_config, penalty_schedule
from .extra import DecoderExtra, decoder_extra
from .knowledge import Knowledge
from .option_checks import check_options
from .precision import EarlyTolerance, clamp_tolerance
from .stability import JacobianPenalty, PositionSpectralRadii
from .stack_depth import StackDepth
from .words import embedding, softmax

Stats = tuple[SolveStats, SolveStats]
Solves = list[tuple[Callable[[Tensor], Tensor], Equilibrium]]


@dataclass(frozen=True)
class InputOptions:
    """How tokens become the injection.

    Attributes:
        scale: factor of the embeddings.
        dropout: probability of dropping a channel of the embeddings, at all positions of a sample.
        word_dropout: probability of dropping a type of the dictionary, wherever it occurs.
        window: tokens that one injection is made of.
        weight_norm: whether the injection's weight is normalised.
    """

    scale: float
    dropout: float
    word_dropout: float = 0.0
    window: int = 1
    weight_norm: bool = False


@dataclass(frozen=True)
class SolvedSegment:
    """A segment at its equilibrium.

    Attributes:
        prepared: the layer with the weights of this forward pass.
        embedded: embeddings of the tokens, (B, T, E).
        injection: u, (B, T, D).
        solved: f and its equilibrium, for each subsequence.
        extra: the results of the solves.
    """

    prepared: PreparedLayer
    embedded: Tensor
    injection: Tensor
    solved: Solves
    extra: DecoderExtra

    @property
    def state(self) -> Tensor:
        """The equilibria, (B, T, C)."""
        return _joined([equilibrium.state for _, equilibrium in self.solved])

    @property
    def record(self) -> Tensor:
        """What later positions need of these, (B, T, R)."""
        return _record(self.solved)


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts of a segment, (B, T', C) each, one after another."""
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _record(solved: Solves) -> Tensor:
    return _joined([recorded(f, equilibrium.state) for f, equilibrium in solved])


class SegmentDecoder(FairseqIncrementalDecoder):
    """Embeds tokens, injects them into the layer, and solves for its equilibrium.

    Args:
        cfg: options of the model.
        dictionary: fairseq's dictionary.
        layer: f.
        inputs: how tokens become its injection.
    Raises:
        ValueError: an option cannot work; the sentence names it and the valid values.
    """

    def __init__(
        self, cfg: DEQLanguageModelConfig, dictionary: Any, layer: Layer, inputs: InputOptions
    ) -> None:
        super().__init__(dictionary)
        check_options(cfg, len(dictionary))
        if str(cfg.solver_scope) == "recurrence" and not layer.is_recurrent:
            raise OptionError(
                "--solver-scope recurrence is for TrellisNets; this model takes position, sample or batch"
            )
        self.solver, self.gradient = forward_solver(cfg), gradient_config(cfg)
        self.penalty, self.radius_steps = penalty_schedule(cfg), cfg.spectral_radius
        updates = round(cfg.early_share * cfg.max_update) if cfg.early_eps else 0
        self.early = EarlyTolerance(cfg.early_eps, updates)
        self.dropout = cfg.dropout
        self.pretrain_steps, self.stack = cfg.pretrain_steps, StackDepth.of(cfg)
        self.mem_len, self.subseq_len = cfg.mem_len, cfg.subseq_len
        self.subseq_forget = is_on(cfg, "subseq_forget")
        self.num_updates = 0
        self.padding_idx = dictionary.pad()
        self.dim = cfg.decoder_embed_dim
        self.inputs = inputs
        self.layer = layer
        self.injection = Injection(self.dim, layer.injection_dim, inputs.window, inputs.weight_norm)
        initializer = Initializer(str(cfg.init), cfg.init_std, cfg.init_range)
        layer.initialize(initializer)
        self.injection.initialize(initializer)
        self.knowledge = Knowledge(cfg, layer, self.solver.scope)
        self.embed_tokens = embedding(cfg, dictionary)
        self.adaptive_softmax, self.output_projection = softmax(
            cfg, dictionary, self.embed_tokens, layer.output_dim
        )

    def set_num_updates(self, num_updates: int) -> None:
        """Set the number of finished updates; it decides the phase and when learned buffers are renewed."""
        if num_updates != self.num_updates and self.training and self.num_updates >= self.pretrain_steps:
            self.knowledge.renew(self.num_updates)
        self.num_updates = num_updates

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Give the parameters in a checkpoint of version 0.1.0 their present names; fairseq calls this.

        Args:
            state_dict: of the whole model; changed in place.
            name: of this decoder in it.
        """
        for key in [key for key in state_dict if key.startswith(f"{name}.cell.")]:
            state_dict[f"{name}.layer." + key.removeprefix(f"{name}.cell.")] = state_dict.pop(key)

    @property
    def pretraining(self) -> bool:
        """Whether the model is a tied stack now.

        Training asks for the next update, evaluation for the last finished one: after exactly
        `pretrain_steps` updates the weights are still those of a stack.
        """
        if self.training:
            return self.num_updates < self.pretrain_steps
        return self.pretrain_steps > 0 and self.num_updates <= self.pretrain_steps

    # ------------------------------------------------------------------ one segment

    def solve_segment(self, tokens: Tensor, memory: Memory | None, padding: Tensor | None) -> SolvedSegment:
        """Solve for a segment, a subsequence at a time.

        Args:
            tokens: (B, T).
            memory: the memory of the segment before; None: none.
            padding: (B, M + T) bool, True at padding; None: there is none at the beginning of a row.
        """
        length, before = tokens.shape[1], memory.length if memory is not None else 0
        embedded = self.embed(tokens)
        injection = self.inject(embedded, memory.injection if memory is not None else None)
        z0 = self.start(embedded, injection)
        z0 = injection.new_zeros(*tokens.shape, self.layer.state_dim) if z0 is None else z0
        prepared = self.layer.prepare(self.layer.draw(tokens.shape[0], length, before, injection))
        context = None
        if memory is not None and before:
            context = prepared.context(memory.state, memory.injection, None)
        stats = SolveStats.empty(tokens.device), SolveStats.empty(tokens.device)
        solved: Solves = []
        step = length if self.pretraining or not self.subseq_len else self.subseq_len
        real = tokens.ne(self.padding_idx)
        seen = 0  # the first position, memory included, that a subsequence sees
        for start in range(0, length, step):
            u = injection[:, start : start + step]
            hidden = None if padding is None else padding[:, seen : before + start + u.shape[1]]
            f = prepared.bind(u, context, hidden, start)
            part = real[:, start : start + step]
            own = (stats[0].at(part), stats[1].at(part))
            solved.append((f, self.find_equilibrium(f, z0[:, start : start + step], own)))
            if start + step < length:
                if self.subseq_forget:
                    context, seen = None, before + start
                context = prepared.context(_record(solved[-1:]), u, context)
        report_solves([equilibrium for _, equilibrium in solved], real)
        if self.training and not self.pretraining and torch.is_grad_enabled():
            self.knowledge.collect(self.num_updates, solved, embedded, real, stats)
        # A convolution over the tokens needs the embeddings themselves; a linear map is not computed again.
        carried = embedded if self.injection.window > 1 else injection
        extra = decoder_extra(
            [equilibrium for _, equilibrium in solved],
            stats,
            memory=self._remember(memory, solved, carried),
            jacobian_penalty=self._jacobian_penalty(solved, real),
            spectral_radii=self._spectral_radii(solved, real),
        )
        return SolvedSegment(prepared, embedded, injection, solved, extra)

    def _jacobian_penalty(self, solved: Solves, real: Tensor) -> JacobianPenalty | None:
        """The Jacobian penalty, in the updates that it counts in."""
        if not self.training or self.pretraining or not torch.is_grad_enabled():
            return None
        weight = self.penalty.at(self.num_updates) + self.knowledge.penalty_weight()
        return JacobianPenalty.of([e for _, e in solved], real, weight) if weight else None

    def _spectral_radii(self, solved: Solves, real: Tensor) -> PositionSpectralRadii | None:
        """The spectral radii, in evaluations that ask for them."""
        if not self.radius_steps or self.training or self.pretraining:
            return None
        return PositionSpectralRadii([(f, e.state) for f, e in solved], real, self.radius_steps)

    def find_equilibrium(self, f: Callable[[Tensor], Tensor], z0: Tensor, stats: Stats) -> Equilibrium:
        """The equilibrium of f from z0 (B, T, C); in the pretraining the last layer of a stack."""
        if self.pretraining:
            layers = self.stack.at(self.num_updates) if self.training else self.stack.layers
            return Equilibrium(unroll(f, z0, layers), None, *stats)
        return fixed_point(f, z0, *self.solve_options(z0), *stats, self.knowledge.preconditioner())

    def start(self, embedded: Tensor, injection: Tensor, before: Tensor | None = None) -> Tensor | None:
        """The learned start of the solve for tokens of these embeddings, (B, T, C); None: not known."""
        if self.pretraining:
            return None
        start = self.knowledge.start(embedded, before)
        return None if start is None else start.to(injection.dtype)

    def solve_options(self, like: Tensor) -> tuple[SolverConfig, GradientConfig]:
        """Options of the solves that start from `like`, with tolerances of this update, within reach of its
        precision."""
        gradient = self.gradient.following(self.solver)
        solver, backward = self.solver, gradient.solver
        assert backward is not None
        if self.training:
            solver, backward = (self.early.at(config, self.num_updates) for config in (solver, backward))
        solver, backward = clamp_tolerance(solver, like), clamp_tolerance(backward, like)
        return solver, gradient if backward is gradient.solver else replace(gradient, solver=backward)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens (B, T); nothing at padding."""
        embedded = self.embed_tokens(tokens) * self.inputs.scale
        types = variational_mask(embedded, (len(self.dictionary), 1), self.inputs.word_dropout, self.training)
        if types is not None:
            embedded = embedded * F.embedding(tokens, types)
        return (
            embedded if self.injection.window == 1 else embedded * tokens.ne(self.padding_idx).unsqueeze(-1)
        )

    def inject(self, embedded: Tensor, before: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """u, (B, T, injection_dim), from embeddings (B, T, D) and those `before` them, (B, S, D)."""
        shape = (embedded.shape[0], 1, self.dim)
        mask = variational_mask(embedded, shape, self.inputs.dropout, self.training)
        if self.injection.window == 1 or before is None:
            return self.injection(apply_mask(embedded, mask), weight=weight)
        return self.injection(apply_mask(embedded, mask), apply_mask(before.to(embedded.dtype), mask), weight)

    @torch.no_grad()
    def _remember(self, memory: Memory | None, solved: Solves, carried: Tensor) -> Memory | None:
        """The memory after a segment; what a segment's injections are made of is `carried`, (B, T, ...)."""
        keep = self.layer.memory_length(self.mem_len)
        if keep == 0:
            return None
        record = _record(solved)
        if memory is None:
            memory = Memory(record[:, :0], carried[:, :0])
        return memory.extended(record, carried, keep).detached()

    def padding(self, tokens: Tensor, before: int) -> Tensor | None:
        """(B, M + T), True at padding; None where no row begins with it, since f looks back only."""
        padding = tokens.eq(self.padding_idx)
        if not bool(padding[:, 0].any()):
            return None
        return F.pad(padding, (before, 0), value=False)
