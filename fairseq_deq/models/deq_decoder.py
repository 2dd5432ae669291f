"""A fairseq decoder whose only layer is solved to its equilibrium."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor, nn

from ..implicit import Equilibrium, GradientConfig, SolveStats, fixed_point, unroll
from ..modules.cell import Cell
from ..modules.dropout import apply_mask, variational_mask
from ..modules.injection import Injection
from ..modules.memory import Memory, MemoryCarrier
from ..modules.weight_norm import Initializer
from ..options import is_on
from ..solvers import SolverConfig, solve
from .decoding import DecodingCache, Prompt, nothing_settled
from .deq_config import (
    DEQLanguageModelConfig,
    check_options,
    forward_solver,
    gradient_config,
    penalty_schedule,
)
from .knowledge import Knowledge
from .precision import within_reach
from .solve_report import report_solves
from .stability import BlockRadii, JacobianTerm
from .words import embedding, softmax


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


class DEQDecoder(FairseqIncrementalDecoder):
    """Embeds tokens, injects them into the cell, solves for its equilibrium, and scores the next token.

    Args:
        cfg: options of the model.
        dictionary: fairseq's dictionary.
        cell: the layer f.
        inputs: how tokens become its injection.
    Raises:
        ValueError: an option cannot work; the sentence names it and the valid values.
    """

    def __init__(
        self, cfg: DEQLanguageModelConfig, dictionary: Any, cell: Cell, inputs: InputOptions
    ) -> None:
        super().__init__(dictionary)
        check_options(cfg, len(dictionary))
        self.solver, self.gradient = forward_solver(cfg), gradient_config(cfg)
        self.penalty, self.radius_steps = penalty_schedule(cfg), cfg.spectral_radius
        self.early_eps = cfg.early_eps
        self.early_updates = round(cfg.early_share * cfg.max_update) if cfg.early_eps else 0
        self.dropout = cfg.dropout
        self.pretrain_steps, self.pretrain_layers = cfg.pretrain_steps, cfg.pretrain_layers
        self.mem_len, self.subseq_len = cfg.mem_len, cfg.subseq_len
        self.subseq_forget = is_on(cfg, "subseq_forget")
        self.num_updates = 0
        self.padding_idx = dictionary.pad()
        self.dim = cfg.decoder_embed_dim
        self.inputs = inputs
        self.cell = cell
        self.injection = Injection(self.dim, cell.injection_dim, inputs.window, inputs.weight_norm)
        initializer = Initializer(str(cfg.init), cfg.init_std, cfg.init_range)
        cell.initialize(initializer)
        self.injection.initialize(initializer)
        self.knowledge = Knowledge(cfg, cell, self.solver.scope)
        self.embed_tokens = embedding(cfg, dictionary)
        self.adaptive_softmax, self.output_projection = softmax(
            cfg, dictionary, self.embed_tokens, cell.output_dim
        )

    # ------------------------------------------------------------------ fairseq's interface

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        src_lengths: Tensor | None = None,
        memory: Memory | MemoryCarrier | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Score the next token at every position.

        Args:
            prev_output_tokens: tokens, (B, T); with `incremental_state` all tokens so far.
            encoder_out: unused; part of fairseq's interface.
            incremental_state: where decoding keeps its cache.
            features_only: leave the softmax out.
            src_lengths: unused; part of fairseq's interface.
            memory: what the previous segment left; or its carrier, which is left the new memory too.
        Returns:
            logits (B, T, V), or features (B, T, C) for the adaptive softmax; and a dictionary with `attn`
            (always None), `equilibria` (a list of `Equilibrium`, one a subsequence), `forward_stats` and
            `backward_stats` (`SolveStats`, the latter filled by the backward pass), `memory`, and, None where
            they were not asked for, `jacobian_term` (in training) and `block_radii` (in evaluation).
        """
        x, extra = self.extract_features(prev_output_tokens, encoder_out, incremental_state, memory=memory)
        return (x if features_only else self.output_layer(x)), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict[str, Any] | None = None,
        src_lengths: Tensor | None = None,
        memory: Memory | MemoryCarrier | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The equilibria, (B, T, C), ready for the softmax; arguments and extra as in `forward`."""
        carrier: MemoryCarrier | None = None
        if isinstance(memory, MemoryCarrier):
            carrier, memory = memory, memory.before(prev_output_tokens.device)
        if incremental_state is not None:
            return self._decode(prev_output_tokens, incremental_state, memory)
        padding = self._padding(prev_output_tokens, memory.length if memory is not None else 0)
        x, extra = self._solve_segment(prev_output_tokens, memory, padding)
        if carrier is not None:
            carrier.after = extra["memory"]
        return x, extra

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits (B, T, V) of the full softmax; the features themselves where the softmax is adaptive."""
        if self.adaptive_softmax is not None:
            return features
        if self.output_projection is not None:
            return self.output_projection(features)
        assert isinstance(self.embed_tokens, nn.Embedding)
        return F.linear(features, self.embed_tokens.weight)

    def max_positions(self) -> int:
        """Positions are relative: there is no longest input."""
        return int(1e6)

    def set_num_updates(self, num_updates: int) -> None:
        """Updates finished so far; decides the phase, and when what solves have taught is made use of."""
        if num_updates != self.num_updates and self.training and self.num_updates >= self.pretrain_steps:
            self.knowledge.renew(self.num_updates)
        self.num_updates = num_updates

    @property
    def pretraining(self) -> bool:
        """Whether the model is a tied stack now.

        In training this is about the update to come, in evaluation about those behind: after exactly
        `pretrain_steps` updates the weights are still a stack's.
        """
        if self.training:
            return self.num_updates < self.pretrain_steps
        return self.pretrain_steps > 0 and self.num_updates <= self.pretrain_steps

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Follow fairseq's beams: row i of the cache becomes row `new_order[i]` of the old one."""
        cache = self._cache(incremental_state)
        if cache is not None:
            self.set_incremental_state(incremental_state, "cache", cache.reordered(new_order))

    # ------------------------------------------------------------------ one segment

    def _solve_segment(
        self, tokens: Tensor, memory: Memory | None, padding: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        length, before = tokens.shape[1], memory.length if memory is not None else 0
        embedded = self._embed(tokens)
        injection = self._inject(embedded, memory.injection if memory is not None else None)
        z0 = self._start(embedded, injection)
        z0 = injection.new_zeros(*tokens.shape, self.cell.state_dim) if z0 is None else z0
        prepared = self.cell.prepare(self.cell.draw(tokens.shape[0], length, before, injection))
        past = (
            prepared.settled(memory.state, memory.injection, None) if memory is not None and before else None
        )
        stats = self._no_stats(tokens)
        equilibria: list[Equilibrium] = []
        solved = []
        step = length if self.pretraining or not self.subseq_len else self.subseq_len
        real = tokens.ne(self.padding_idx)
        seen = 0  # the first position, memory included, that a subsequence sees
        for start in range(0, length, step):
            u = injection[:, start : start + step]
            hidden = None if padding is None else padding[:, seen : before + start + u.shape[1]]
            f = prepared.bind(u, past, hidden, start)
            part = real[:, start : start + step]
            own = (stats[0].at(part), stats[1].at(part))
            equilibria.append(self._equilibrium(f, z0[:, start : start + step], own))
            solved.append((f, equilibria[-1]))
            if start + step < length:
                if self.subseq_forget:
                    past, seen = None, before + start
                past = prepared.settled(equilibria[-1].state, u, past)
        report_solves(equilibria, real)
        state = torch.cat([e.state for e in equilibria], 1) if len(equilibria) > 1 else equilibria[0].state
        # A convolution over the tokens needs the embeddings themselves; a linear map is not computed again.
        carried = embedded if self.injection.window > 1 else injection
        extra = self._extra(equilibria, stats, self._remember(memory, state, carried))
        x = self.cell.output(state)
        mask = variational_mask(x, (x.shape[0], 1, x.shape[2]), self.dropout, self.training)
        if self.training and not self.pretraining and torch.is_grad_enabled():
            self.knowledge.collect(self.num_updates, solved, embedded, real, stats)
        extra["jacobian_term"] = self._jacobian_term(equilibria, real)
        if self.radius_steps and not self.training and not self.pretraining:
            states = [(f, equilibrium.state) for f, equilibrium in solved]
            extra["block_radii"] = BlockRadii(states, real, self.radius_steps)
        return apply_mask(x, mask), extra

    def _jacobian_term(self, equilibria: list[Equilibrium], real: Tensor) -> JacobianTerm | None:
        """The Jacobian penalty, in the updates that it counts in."""
        if not self.training or self.pretraining or not torch.is_grad_enabled():
            return None
        weight = self.penalty.at(self.num_updates) + self.knowledge.penalty_weight()
        return JacobianTerm.of(equilibria, real, weight) if weight else None

    def _equilibrium(
        self, f: Callable[[Tensor], Tensor], z0: Tensor, stats: tuple[SolveStats, SolveStats]
    ) -> Equilibrium:
        if self.pretraining:
            return Equilibrium(unroll(f, z0, self.pretrain_layers), None, *stats)
        return fixed_point(f, z0, *self._options(z0), *stats, self.knowledge.preconditioner())

    def _start(self, embedded: Tensor, injection: Tensor, before: Tensor | None = None) -> Tensor | None:
        """The learned start of the solve for tokens of these embeddings, (B, T, C); None: not known."""
        if self.pretraining:
            return None
        start = self.knowledge.start(embedded, before)
        return None if start is None else start.to(injection.dtype)

    def _options(self, like: Tensor) -> tuple[SolverConfig, GradientConfig]:
        """Options of the solves that start from `like`, with tolerances of this update, within reach of its
        precision."""
        solver, backward = self.solver, self.gradient.following(self.solver).solver
        assert backward is not None
        if self.training and self.num_updates < self.early_updates:
            solver, backward = (replace(c, rtol=max(c.rtol, self.early_eps)) for c in (solver, backward))
        solver, backward = within_reach(solver, like), within_reach(backward, like)
        gradient = self.gradient
        return solver, gradient if backward is gradient.solver else replace(gradient, solver=backward)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, D) of tokens (B, T); nothing at padding."""
        embedded = self.embed_tokens(tokens) * self.inputs.scale
        types = variational_mask(embedded, (len(self.dictionary), 1), self.inputs.word_dropout, self.training)
        if types is not None:
            embedded = embedded * F.embedding(tokens, types)
        return (
            embedded if self.injection.window == 1 else embedded * tokens.ne(self.padding_idx).unsqueeze(-1)
        )

    def _inject(self, embedded: Tensor, before: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """u, (B, T, injection_dim), from embeddings (B, T, D) and those `before` them, (B, S, D)."""
        shape = (embedded.shape[0], 1, self.dim)
        mask = variational_mask(embedded, shape, self.inputs.dropout, self.training)
        if self.injection.window == 1 or before is None:
            return self.injection(apply_mask(embedded, mask), weight=weight)
        return self.injection(apply_mask(embedded, mask), apply_mask(before.to(embedded.dtype), mask), weight)

    def _remember(self, memory: Memory | None, state: Tensor, carried: Tensor) -> Memory | None:
        keep = self.cell.remembered(self.mem_len)
        if keep == 0:
            return None
        if memory is None:
            memory = Memory(state[:, :0], carried[:, :0])
        return memory.extended(state, carried, keep).detached()

    def _padding(self, tokens: Tensor, before: int) -> Tensor | None:
        """(B, M + T), True at padding; None where no row begins with it, since f looks back only."""
        padding = tokens.eq(self.padding_idx)
        if not bool(padding[:, 0].any()):
            return None
        return F.pad(padding, (before, 0), value=False)

    @staticmethod
    def _extra(
        equilibria: list[Equilibrium], stats: tuple[SolveStats, SolveStats], memory: Memory | None
    ) -> dict[str, Any]:
        return {
            "attn": None,
            "equilibria": equilibria,
            "forward_stats": stats[0],
            "backward_stats": stats[1],
            "memory": memory,
            "jacobian_term": None,
            "block_radii": None,
        }

    # ------------------------------------------------------------------ incremental decoding

    def _cache(self, incremental_state: dict[str, Any]) -> DecodingCache | None:
        return self.get_incremental_state(incremental_state, "cache")

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        incremental_state: dict[str, Any],
        memory: Memory | MemoryCarrier | None = None,
    ) -> None:
        """Solve for whole prompts in one parallel solve, before decoding goes through their tokens.

        Args:
            tokens: prompts, (B, L); those that are shorter are padded on the right, or on the left.
            incremental_state: where decoding keeps its cache; nothing has been decoded in it yet.
            memory: what the text before the prompts left, or its carrier.
        """
        if isinstance(memory, MemoryCarrier):
            memory = memory.before(tokens.device)
        if not self.pretraining:
            self.set_incremental_state(incremental_state, "cache", self._begin(tokens, memory)[0])

    @torch.no_grad()
    def _decode(
        self, tokens: Tensor, incremental_state: dict[str, Any], memory: Memory | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The equilibrium of each row's last token, (B, 1, C)."""
        if self.training:
            raise RuntimeError(
                "incremental decoding has neither dropout nor gradients; call model.eval() first"
            )
        if self.pretraining:  # every layer of a stack has keys and values of its own: there is no cache
            padding = self._padding(tokens, memory.length if memory is not None else 0)
            x, extra = self._solve_segment(tokens, memory, padding)
            return x[:, -1:], extra
        cache, extra = self._cache(incremental_state), self._extra([], self._no_stats(tokens), None)
        if cache is None:
            cache, extra = self._begin(tokens, memory)
        state = cache.known(tokens.shape[1] - 1)
        if state is None:
            cache, extra = self._continue(cache.in_order(), tokens)
            state = cache.last
        self.set_incremental_state(incremental_state, "cache", cache)
        return self.cell.output(state).clone(), extra  # fairseq's search writes to what it gets

    def _begin(self, tokens: Tensor, memory: Memory | None) -> tuple[DecodingCache, dict[str, Any]]:
        """Solve for the first tokens of every text, all at once."""
        before = memory.length if memory is not None else 0
        padding = self._padding(tokens, before)
        _, extra = self._solve_segment(tokens, memory, padding)
        state = torch.cat([equilibrium.state for equilibrium in extra["equilibria"]], 1)
        embedded = self._embed(tokens)
        injection = self._inject(embedded, memory.injection if memory is not None else None)
        prepared = self.cell.prepare(self.cell.draw(tokens.shape[0], 1, 0, injection))
        settled = nothing_settled(prepared, tokens.shape[0])
        if memory is not None and before:
            settled.append(memory.state, memory.injection)
        real = tokens.ne(self.padding_idx)
        lengths = (real * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1)
        common = int(lengths.min())
        settled.append(state[:, :common], injection[:, :common])
        real = real[:, :common].unsqueeze(-1)
        context = embedded[:, :common]
        if memory is not None and self.injection.window > 1:
            context = torch.cat([memory.injection, context], 1)
        cache = DecodingCache(
            settled,
            before,
            injection_weight=self.injection.normalized_weight(),
            context=self._context(context),
            last=state[:, common - 1 : common],
            total=(state[:, :common] * real).sum(1, keepdim=True),
            count=real.sum(1, keepdim=True),
            padding=None if padding is None else padding[:, : before + common],
            prompt=Prompt(state, lengths),
        )
        return cache, extra

    def _continue(self, cache: DecodingCache, tokens: Tensor) -> tuple[DecodingCache, dict[str, Any]]:
        """Solve for the tokens that are not settled, against those that are."""
        new = tokens[:, cache.seen :]
        padding = cache.padding
        if padding is not None:
            padding = torch.cat([padding, new.eq(self.padding_idx)], 1)
        embedded = self._embed(new)
        injection = self._inject(embedded, cache.context, cache.injection_weight)
        f = cache.settled.bind(injection, padding)
        stats, real = self._no_stats(tokens), new.ne(self.padding_idx)
        start = self._start(embedded, injection, cache.context[:, -1:])
        if new.shape[1] > 1:
            z0 = injection.new_zeros(*new.shape, self.cell.state_dim) if start is None else start
            equilibrium = fixed_point(f, z0, *self._options(z0), *stats, self.knowledge.preconditioner())
        else:
            z0, known = cache.start(start)
            result = solve(f, z0, within_reach(self.solver, z0), self.knowledge.preconditioner())
            real = real if known is None else real & ~known.squeeze(-1)
            stats[0].at(real).record(result)
            state = result.state if known is None else torch.where(known, z0, result.state)
            equilibrium = Equilibrium(state, result, *stats)
        report_solves([equilibrium], real)
        context = self._context(torch.cat([cache.context, embedded], 1))
        cache = cache.extended(equilibrium.state, injection, context, padding)
        return cache, self._extra([equilibrium], stats, None)

    def _context(self, embedded: Tensor) -> Tensor:
        """The last embeddings, as many as the next injection and its start are made of beside its own."""
        return embedded[:, max(0, embedded.shape[1] - max(self.injection.window - 1, 1)) :]

    @staticmethod
    def _no_stats(like: Tensor) -> tuple[SolveStats, SolveStats]:
        return SolveStats.empty(like.device), SolveStats.empty(like.device)
