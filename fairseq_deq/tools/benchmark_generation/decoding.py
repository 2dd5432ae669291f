#!/usr/bin/env python
"""Tokens per second and cache of generation, beside fairseq's transformer_lm of 12 layers.

    python scripts/benchmark_generation.py data-bin/wikitext-2 --path checkpoint_last.pt --out generation

Contenders: the model of --path with its cached equilibria; the same without a cache, the whole text solved
again for every token; and a transformer_lm of the same width, feed-forward part, heads and dictionary, with
fairseq's own incremental decoding (its weights are random: its speed does not depend on them). Contexts are
real text, from the validation part of the data. The time of a token is that of decoder, softmax, search and
reordering of the cache; with a beam of 1 tokens are sampled (top 40), wider beams are searched. The context
itself is not timed. The contenders take turns, so that a busy machine slows all of them alike: rates are
medians over the turns, ratios medians of the ratios within a turn, by the clock and by the processor's time.
OUT.json and OUT.png are written beside the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq.models.decoding_cache import DecodingCache
from fairseq_deq.patches.sentences import one_sentence

TOP = 40  # of the sampling


@dataclass
class Rate:
    """How one contender did in one setting.

    Attributes:
        seconds, cpu_seconds: a token of all rows, one entry a turn; by the clock, and of the processor.
        evaluations: of f, a token of all rows: as long as the slowest row needs.
        own_evaluations: of f at a row, a token: what was computed for each.
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
    if isinstance(state, DecodingCache):
        return state.nbytes
    if isinstance(state, Tensor):
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
    """fairseq's transformer_lm of the width, feed-forward part, heads and softmax of `deq`."""
    decoder = deq.decoder
    cell = decoder.layer
    options = Namespace(
        decoder_layers=layers,
        decoder_embed_dim=decoder.dim,
        decoder_input_dim=decoder.dim,
        decoder_output_dim=decoder.dim,
        decoder_ffn_embed_dim=cell.ffn_in.weight_v.shape[0],
        decoder_attention_heads=cell.heads,
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


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each setting."""
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.path], arg_overrides={"data": args.data} | json.loads(args.overrides)
    )
    deq = models[0].eval().to(device)
    stack = build_stack(deq, task, args.layers).to(device)
    for model in (deq, stack):
        model.prepare_for_inference_(cfg)
    blocks = data_utils.load_indexed_dataset(os.path.join(args.data, "valid"), task.source_dictionary)
    if blocks is None:
        raise SystemExit(f"{args.data} has no validation text: give fairseq-preprocess a --validpref")
    text = torch.cat([blocks[i] for i in range(len(blocks))]).long()
    results = []
    for length in args.contexts:
        for batch in args.batches:
            for beam in args.beams:
                if batch * length > text.numel():
                    raise SystemExit(f"the validation text is too short for {batch} contexts of {length}")
                context = text[: batch * length].view(batch, length).to(device)
                results.append(setting(args, deq, stack, context, beam))
                print(row(results[-1]), flush=True)
    return results


def setting(args: argparse.Namespace, deq: Any, stack: Any, context: Tensor, beam: int) -> dict[str, Any]:
    """All contenders in turns, after `context` (B, S)."""
    rates = {name: Rate() for name in ("ours", "stack", "uncached")}
    begin_ours, begin_theirs = begin_deq(deq), begin_stack(stack)
    uncached = args.uncached_tokens if context.numel() * beam <= args.uncached_limit else 0
    for turn in range(args.turns + 1):  # the first does not count
        kept = rates if turn else {name: Rate() for name in rates}
        generate(deq, context, beam, args.tokens, begin_ours, kept["ours"])
        generate(stack, context, beam, args.tokens, begin_theirs, kept["stack"])
        if turn and uncached:
            generate_without_cache(deq, context, beam, uncached, kept["uncached"])
    return summary(*context.shape[::-1], beam, rates)


def summary(length: int, batch: int, beam: int, rates: dict[str, Rate]) -> dict[str, Any]:
    """Rates and ratios of one setting."""
    rows = batch * beam
    entry: dict[str, Any] = {"context": length, "batch": batch, "beam": beam}
    for name, rate in rates.items():
        if rate.seconds:
            median = statistics.median(rate.seconds)
            entry[name] = {"tokens_per_second": rows / median, **asdict(rate)}
    ours, stack = rates["ours"], rates["stack"]
    for name, times in (("speed", "seconds"), ("cpu_speed", "cpu_seconds")):
        turns = zip(getattr(ours, times), getattr(stack, times))
        entry[f"{name}_over_stack"] = statistics.median(theirs / own for own, theirs in turns)
    entry["cache_under_stack"] = stack.cache_bytes / ours.cache_bytes
    return entry


HEADER = (
    "context batch beam | ours tok/s  no cache  layers |  ratio    cpu | evals  computed  needed | "
    "cache B/token  layers"
)


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    ours, stack, uncached = entry["ours"], entry["stack"], entry.get("uncached")
    slow = f"{uncached['tokens_per_second']:9.2f}" if uncached else "        -"
    cells = (
        f"{entry['context']:7d} {entry['batch']:5d} {entry['beam']:4d}",
        f"{ours['tokens_per_second']:10.1f} {slow} {stack['tokens_per_second']:7.1f}",
        f"{entry['speed_over_stack']:6.2f} {entry['cpu_speed_over_stack']:6.2f}",
        f"{ours['evaluations']:5.1f} {ours['own_evaluations']:9.1f} {ours['needed_evaluations']:7.1f}",
        f"{ours['cache_bytes']:13.0f} {stack['cache_bytes']:7.0f}",
    )
    return " | ".join(cells)


def plot(results: list[dict[str, Any]], layers: int, path: Path) -> None:
    """Tokens per second against the context, a panel for each batch and beam."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r["batch"], r["beam"]) for r in results})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False)
    labels = {
        "ours": "cached equilibria",
        "stack": f"transformer_lm, {layers} layers",
        "uncached": "without cache",
    }
    for axis, (batch, beam) in zip(axes[0], panels):
        chosen = [r for r in results if (r["batch"], r["beam"]) == (batch, beam)]
        for name, label in labels.items():
            points = [(r["context"], r[name]["tokens_per_second"]) for r in chosen if name in r]
            if points:
                axis.plot(*zip(*points), marker="o", label=label)
        axis.set(title=f"batch {batch}, beam {beam}", xlabel="context", xscale="log", yscale="log")
    axes[0][0].set_ylabel("tokens per second")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", required=True, help="checkpoint of a DEQ-Transformer")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated in a turn")
    parser.add_argument("--uncached-tokens", type=int, default=1, help="the same without cache; 0: none")
    parser.add_argument("--uncached-limit", type=int, default=4096, help="tokens of its largest batch")
    parser.add_argument("--turns", type=int, default=5, help="turns that count, after one that does not")
    parser.add_argument("--layers", type=int, default=12, help="layers of the transformer_lm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overrides", default="{}", help='options of the model as JSON: {"f_eps": 1e-4}')
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark_generation"))
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    print(HEADER)
    with torch.no_grad():
        results = measure(args)
    settings = {key: str(value) for key, value in vars(args).items()} | {"torch": torch.__version__}
    args.out.with_suffix(".json").write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    plot(results, args.layers, args.out.with_suffix(".png"))
    print(f"{args.out.with_suffix('.json')} and {args.out.with_suffix('.png')} written")


if __name__ == "__main__":
    with one_sentence():
        main()
