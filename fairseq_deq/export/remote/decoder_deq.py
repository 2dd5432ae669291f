"""The whole model (embed, inject, solve for the equilibrium, score) and the cache that it keeps of a text.

Part of a model that fairseq_deq exported (MIT licence). It needs torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options_deq import ModelOptions
from .recurrence_deq import solve_recurrence
from .rows_deq import Preconditioner, rowwise_linear
from .solve_deq import Solved, solve
from .stack_deq import Stack
from .transformer_deq import TransformerLayer
from .trellis_deq import TrellisLayer, last_of
from .words_deq import AdaptiveSoftmax, Bands, Softmax, Table

# A longer text is solved in parts of this many tokens, each of which sees all tokens before it. So the memory
# of a solve grows linearly with the length of the text, and not with its square.
PART = 1024


class TextCache:
    """What a model keeps of texts to go on with them: a row per text, without its padding.

    Attributes:
        columns: number of tokens read, padding included.
        lengths: number of tokens of each text, (B,).
        context: the embeddings of the last R tokens of each text, (B, R, D), zeros before its first.
        past: what the layer keeps of the equilibria.
        total: the sum of the equilibria of each text, (B, 1, C).
        positions, evaluations, converged: sums over all solves so far: positions solved for, evaluations of f
            at them, and positions that converged.
    """

    # What transformers asks of a cache: it can be neither compiled nor cut, and has a column for each token.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self, model: DEQDecoder, batch: int, like: Tensor) -> None:
        self.columns = 0
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.context = like.new_zeros(batch, max(model.options.window - 1, 1), model.options.embed_dim)
        self.past: Any = model.layer.beginning(batch, like)
        self.total = like.new_zeros(batch, 1, model.layer.state_dim)
        self.positions = self.evaluations = self.converged = 0

    @property
    def converged_share(self) -> float:
        """Share of the positions solved so far that converged; 1 if there are none."""
        return self.converged / self.positions if self.positions else 1.0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens read, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make text i a copy of text `beam_idx[i]`, for all i at once."""
        order = beam_idx.to(self.lengths.device)
        self.lengths, self.context, self.total = (
            x.index_select(0, order) for x in (self.lengths, self.context, self.total)
        )
        self.past = self.past.reordered(order)

    def count(self, solved: Solved, real: Tensor) -> None:
        """Add a solve to the sums; padding, where `real` (B, T) is False, does not count."""
        sums = torch.stack([real.sum(), (solved.evaluations * real).sum(), (solved.converged & real).sum()])
        positions, evaluations, converged = sums.tolist()
        self.positions += positions
        self.evaluations += evaluations
        self.converged += converged


@dataclass(frozen=True)
class Features:
    """The features that the softmax reads, and how their solves went; a column per token, padding included.

    Attributes:
        features: (B, T, C), zeros at padding.
        evaluations: of f at each position, (B, T).
        residual: relative residual that was reached, (B, T).
        converged: (B, T) bool.
        real: (B, T) bool, False at padding, where the other attributes have no meaning.
    """

    features: Tensor
    evaluations: Tensor
    residual: Tensor
    converged: Tensor
    real: Tensor


class DEQDecoder(nn.Module):
    """A language model of one layer at its equilibrium.

    Args:
        options: the options of the model.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = o = options
        self.layer = _layer(o)
        self.injection = nn.Linear(o.window * o.embed_dim, self.layer.injection_dim)
        bands = o.adaptive_input_cutoff
        self.embedding = (
            Bands(o.vocab_size, o.embed_dim, bands, o.adaptive_input_factor)
            if bands
            else Table(o.vocab_size, o.embed_dim)
        )
        features = o.output_dim if o.family == "trellisnet" else o.embed_dim
        self.softmax: Softmax | AdaptiveSoftmax = (
            AdaptiveSoftmax(
                o.vocab_size,
                features,
                o.adaptive_softmax_cutoff,
                o.adaptive_softmax_factor,
                o.tie_softmax,
                o.tie_projections,
                o.output_bias,
                o.softmax_projection,
            )
            if o.adaptive_softmax_cutoff
            else Softmax(o.vocab_size, features, own=not o.tie_softmax, bias=o.output_bias)
        )
        # The preconditioner and the start, learned from the solves of training; they change no equilibrium.
        state, own = self.layer.state_dim, o.hidden_dim if o.solver_scope == "recurrence" else None
        self.preconditioner = nn.ParameterDict()
        if o.preconditioner_rank:
            for name in ("left", "right"):
                self.preconditioner[name] = _constant(own or state, o.preconditioner_rank)
        self.start = nn.ParameterDict()
        if o.learned_start:
            self.start["weight"] = _constant(state, 2 * o.embed_dim + 1)

    def extract(self, tokens: Tensor, real: Tensor, cache: TextCache) -> Features:
        """Solve for the equilibria of the tokens that follow those of the cache.

        Args:
            tokens: (B, T).
            real: (B, T) bool, False at padding, which may be anywhere.
            cache: of the texts so far; these tokens are added to it.
        Returns:
            the `Features` of these tokens.
        """
        real = real & tokens.ne(self.options.pad)
        order, place = _without_padding(real)
        moved = tokens if order is None else tokens.gather(1, order)
        counts = real.sum(1)
        most = int(counts.max()) if counts.numel() else 0
        size = self.options.subseq_len or PART
        parts = [
            self._part(moved[:, begin : min(begin + size, most)], (counts - begin).clamp(0, size), cache)
            for begin in range(0, most, size)
        ]
        cache.columns += tokens.shape[1]
        outputs = []
        for i, (width, dtype) in enumerate(
            ((self.layer.state_dim, None), (0, torch.int32), (0, torch.float32), (0, torch.bool))
        ):
            shape = (*tokens.shape, width) if width else tokens.shape
            full = cache.total.new_zeros(shape, dtype=dtype or cache.total.dtype)
            done = torch.cat([part[i] for part in parts], 1) if parts else full[:, :0]
            full[:, :most] = done
            outputs.append(full if place is None else _spread(full, place, real))
        state, evaluations, residual, converged = outputs
        return Features(self.layer.output(state), evaluations, residual, converged, real)

    def _part(self, tokens: Tensor, counts: Tensor, cache: TextCache) -> tuple[Tensor, ...]:
        """Solve for one part of a text.

        Args:
            tokens: (B, T), without padding between them.
            counts: how many tokens of each row are real, (B,); they come first.
            cache: as for `extract`.
        Returns:
            state (B, T, C), evaluations, residual and convergence (B, T).
        """
        length = tokens.shape[1]
        alone = length == 1
        if not alone:  # to a multiple of 16, so that a row rounds the same whatever the others are
            tokens = F.pad(tokens, (0, -length % 16), value=self.options.pad)
        real = torch.arange(tokens.shape[1], device=tokens.device) < counts.unsqueeze(1)
        embedded = self.embedding(tokens) * self.options.embed_scale
        embedded = embedded * real.unsqueeze(-1)
        seen = torch.cat([cache.context.to(embedded.dtype), embedded], 1)
        f = self.layer.bind(self._inject(seen, tokens.shape[1]), cache.past, cache.lengths)
        solved = self._solve(f, self._begin(seen, cache, tokens), real)
        cache.past = f.settle(solved.state, counts)
        cache.lengths = cache.lengths + counts
        cache.context = last_of(seen, counts + cache.context.shape[1], cache.context.shape[1])
        cache.total = cache.total + (solved.state * real.unsqueeze(-1)).sum(1, keepdim=True)
        cache.count(solved, real)
        state = solved.state * real.unsqueeze(-1)
        return tuple(x[:, :length] for x in (state, solved.evaluations, solved.residual, solved.converged))

    def _inject(self, seen: Tensor, length: int) -> Tensor:
        """u, (B, T, channels of an injection).

        Args:
            seen: embeddings, (B, R + T, D), of which the first R are those before.
            length: number of positions, T.
        """
        window, end = self.options.window, seen.shape[1]
        first = end - length - (window - 1)
        rows = torch.cat([seen[:, first + j : first + j + length] for j in range(window)], -1)
        u = rowwise_linear(rows.flatten(0, 1), self.injection.weight, self.injection.bias)
        return u.view(seen.shape[0], length, -1)

    def _begin(self, seen: Tensor, cache: TextCache, tokens: Tensor) -> Tensor:
        """The state at which the solve starts, (B, T, C).

        It is W [e_t; e_{t-1}; 1] with a learned start. Otherwise a single token starts at the mean of the
        equilibria before it, and several tokens start at zero.
        """
        length = tokens.shape[1]
        embedded, before = seen[:, -length:], seen[:, -length - 1 : -1]
        if self.options.learned_start:
            features = torch.cat([embedded, before, torch.ones_like(embedded[..., :1])], -1)
            rows = rowwise_linear(features.flatten(0, 1), self.start["weight"].to(features.dtype))
            return rows.view(*tokens.shape, -1)
        if length == 1:  # for the first token of a text the mean is zero
            return cache.total / cache.lengths.clamp(min=1).view(-1, 1, 1)
        return seen.new_zeros(*tokens.shape, self.layer.state_dim)

    def _solve(self, f: Any, z0: Tensor, real: Tensor) -> Solved:
        options = self.options.solve.within_reach(z0.dtype)
        known = self.preconditioner
        p = Preconditioner(known["left"], known["right"]) if len(known) else None
        if self.options.solver_scope == "recurrence":
            return solve_recurrence(f.column, z0, real, options, p)
        return solve(f, z0, real, options, p)


def _layer(o: ModelOptions) -> TransformerLayer | Stack | TrellisLayer:
    if o.family == "trellisnet":
        return TrellisLayer(o.hidden_dim, o.output_dim, o.kernel_size)
    if o.family == "transformer":
        layers = [TransformerLayer(o) for _ in range(o.layers)]
        return layers[0] if o.layers == 1 else Stack(layers)
    raise ValueError(f"family must be transformer or trellisnet, got {o.family!r}")


def _constant(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)


def _without_padding(real: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The order of columns that puts the real tokens of each row first, and its inverse, (B, T) each.

    Both are None if the columns are in that order already.
    """
    columns = torch.arange(real.shape[1], device=real.device)
    if bool((real == (columns < real.sum(1, keepdim=True))).all()):
        return None, None
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    return order, order.argsort(1)


def _spread(x: Tensor, place: Tensor, real: Tensor) -> Tensor:
    """The columns of x, (B, T) or (B, T, C), back in their original places; zeros at padding."""
    if x.dim() == 2:
        return x.gather(1, place) * real
    return x.gather(1, place.unsqueeze(2).expand_as(x)) * real.unsqueeze(2)
