"""Decoding by several contenders: with cached equilibria, without a cache, and by a stack of layers."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from torch import Tensor

from ...models.decoding_cache import DecodingCache
from ..probe import synchronize

TOP = 40  # of the sampling


@dataclass
class Rate:
    """How one contender did in one setting.

    Attributes:
        seconds, cpu_seconds: a token of all rows, one entry a turn; by the clock, and of the processor.
        evaluations: of f, a token of all rows: as long as the slowest row needs.
        own_evaluations: of f, per row and token: what was computed for each.
        needed_evaluations: of f at a row before it had converged, a token.
        cache_bytes: kept for each token of each row.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    evaluations: float = 0.0
    own_evaluations: float = 0.0
    needed_evaluations: float = 0.0
    cache_bytes: float = 0.0


class Search:
    """The next tokens, and the row that each continues: sampled from the top 40, or by beam search."""

    def __init__(self, sentences: int, beam: int, device: torch.device) -> None:
        self.sentences, self.beam = sentences, beam
        self.scores = torch.zeros(sentences, beam, 1, device=device)
        self.generator = torch.Generator(device=device).manual_seed(1)

    def __call__(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (rows,) and rows (rows,) from log-probabilities (rows, V)."""
        rows, vocabulary = log_probs.shape
        if self.beam == 1:
            values, index = log_probs.topk(min(TOP, vocabulary))
            choice = torch.multinomial(values.exp(), 1, generator=self.generator)
            return index.gather(1, choice).squeeze(1), torch.arange(rows, device=log_probs.device)
        scores = log_probs.view(self.sentences, self.beam, vocabulary) + self.scores
        best, index = scores.flatten(1).topk(self.beam)
        self.scores = best.unsqueeze(-1)
        first = torch.arange(self.sentences, device=log_probs.device).unsqueeze(1) * self.beam
        return (index % vocabulary).flatten(), (index // vocabulary + first).flatten()


# context (B, S), beam -> incremental state of all its tokens but the last
Begin = Callable[[Tensor, int], dict[str, Any]]


def generate(model: Any, context: Tensor, beam: int, count: int, begin: Begin, rate: Rate) -> None:
    """`count` tokens after `context`, (B, S), timed; the time goes to `rate`."""
    state = begin(context, beam)
    tokens = context.repeat_interleave(beam, 0)
    search, decoder = Search(context.shape[0], beam, context.device), model.decoder
    asked = done = needed = 0
    synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count):
        out, extra = decoder(tokens, incremental_state=state)
        log_probs = model.get_normalized_probs((out[:, -1:], extra), log_probs=True)[:, -1]
        chosen, rows = search(log_probs)
        tokens = torch.cat([tokens.index_select(0, rows), chosen.unsqueeze(1)], 1)
        decoder.reorder_incremental_state_scripting(state, rows)
        for equilibrium in extra.get("equilibria", ()):
            asked += equilibrium.result.nfe
            done += equilibrium.result.total_lane_nfe
            needed += int(equilibrium.result.lane_nfe.sum())
    synchronize()
    rate.seconds.append((time.perf_counter() - start) / count)
    rate.cpu_seconds.append((time.process_time() - cpu_start) / count)
    rate.evaluations = asked / count
    rate.own_evaluations = done / count / tokens.shape[0]
    rate.needed_evaluations = needed / count / tokens.shape[0]
    rate.cache_bytes = cached(state) / tokens.shape[0] / max(1, tokens.shape[1] - 1)


def generate_without_cache(model: Any, context: Tensor, beam: int, count: int, rate: Rate) -> None:
    """The same with the whole text solved for every token."""
    tokens = context.repeat_interleave(beam, 0)
    search = Search(context.shape[0], beam, context.device)
    synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count):
        x, extra = model.decoder.extract_features(tokens)
        out = model.decoder.output_layer(x[:, -1:])
        chosen, rows = search(model.get_normalized_probs((out, extra), log_probs=True)[:, -1])
        tokens = torch.cat([tokens.index_select(0, rows), chosen.unsqueeze(1)], 1)
    synchronize()
    rate.seconds.append((time.perf_counter() - start) / count)
    rate.cpu_seconds.append((time.process_time() - cpu_start) / count)


def cached(state: Any) -> int:
    """Bytes of an incremental state that grow with the text, as far as they hold tokens."""
    if isinstance(state, DecodingCache | Tensor):
        return state.nbytes
    if isinstance(state, dict):
        # fairseq keeps a mask of padding too, where there is any
        return sum(cached(value) for key, value in state.items() if key != "prev_key_padding_mask")
    return 0


def begin_deq(model: Any) -> Begin:
    """One parallel solve for every sentence; its beams share it."""

    def begin(context: Tensor, beam: int) -> dict[str, Any]:
        state: dict[str, Any] = {}
        model.decoder.prefill(context[:, :-1], state)
        rows = torch.arange(context.shape[0], device=context.device).repeat_interleave(beam)
        model.decoder.reorder_incremental_state_scripting(state, rows)
        return state

    return begin


def begin_stack(model: Any) -> Begin:
    """Token by token, as fairseq does; the state is kept, since decoding does not write to its tensors."""
    kept: dict[tuple[int, ...], dict[str, Any]] = {}

    def begin(context: Tensor, beam: int) -> dict[str, Any]:
        key = (*context.shape, beam)
        if key not in kept:
            kept.clear()
            state: dict[str, Any] = {}
            for end in range(1, context.shape[1]):
                model.decoder(context[:, :end], incremental_state=state, features_only=True)
            rows = torch.arange(context.shape[0], device=context.device).repeat_interleave(beam)
            model.decoder.reorder_incremental_state_scripting(state, rows)
            kept[key] = state
        return {name: dict(entry) for name, entry in kept[key].items()}

    return begin


def build_stack(deq: Any, task: Any, layers: int) -> Any:
    """fairseq's transformer_lm of the width, feed-forward part, heads and softmax of `deq`.

    Of a layer without attention it has the width and the softmax; inside four times the width, and heads of
    32 or a little more.
    """
    decoder = deq.decoder
    ffn_in = getattr(decoder.layer, "ffn_in", None)
    about_32 = next(heads for heads in range(max(1, decoder.dim // 32), 0, -1) if decoder.dim % heads == 0)
    options = Namespace(
        decoder_layers=layers,
        decoder_embed_dim=decoder.dim,
        decoder_input_dim=decoder.dim,
        decoder_output_dim=decoder.dim,
        decoder_ffn_embed_dim=4 * decoder.dim if ffn_in is None else ffn_in.weight_v.shape[0],
        decoder_attention_heads=getattr(decoder.layer, "heads", about_32),
        decoder_normalize_before=True,
        share_decoder_input_output_embed=decoder.adaptive_softmax is None,
        adaptive_softmax_cutoff=None,
        max_target_positions=4096,
        tokens_per_sample=4096,
        dropout=0.0,
        attention_dropout=0.0,
        activation_fn="relu",
    )
    if decoder.adaptive_softmax is not None:
        options.adaptive_softmax_cutoff = ",".join(str(c) for c in decoder.adaptive_softmax.cutoff[:-1])
    base_lm_architecture(options)
    return TransformerLanguageModel.build_model(options, task).eval()
