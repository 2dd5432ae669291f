"""Measure tokens per second and cache size of generation, beside fairseq's transformer_lm of 12 layers.

    fairseq-deq-benchmark-generation data-bin/wikitext-2 --path checkpoint_last.pt --out generation
    fairseq-deq-benchmark-generation quickstart/bin --path quickstart/checkpoints/checkpoint_last.pt \\
        --contexts 32 128 --batches 1 8 --beams 1

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
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from torch import Tensor

from ...errors import OptionError
from ..command import add_user_dir, command_line, describe, import_user_dir, progress, tell, written_whole
from .decoding import Rate, begin_deq, begin_stack, build_stack, generate, generate_without_cache
from .output import HEADER, plot, row, summary

PROGRAM = "fairseq-deq-benchmark-generation"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", required=True, help="checkpoint of a DEQ language model")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[32, 128, 512],
        help="numbers of tokens before the first new one",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="numbers of texts at once")
    parser.add_argument(
        "--beams", type=int, nargs="+", default=[1, 4], help="beam widths; with 1 tokens are sampled"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated per turn")
    parser.add_argument(
        "--uncached-tokens",
        type=int,
        default=1,
        help="tokens generated per turn without cache; 0: do not measure that",
    )
    parser.add_argument(
        "--uncached-limit",
        type=int,
        default=4096,
        help="largest batch, in tokens, that is measured without cache",
    )
    parser.add_argument("--turns", type=int, default=5, help="turns that are measured, after one that is not")
    parser.add_argument("--layers", type=int, default=12, help="layers of the transformer_lm")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument("--overrides", default="{}", help='options of the model as JSON: {"f_eps": 1e-4}')
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmark_generation"), help="where to write OUT.json and OUT.png"
    )
    add_user_dir(parser)
    args = parser.parse_args(argv)
    for name in ("contexts", "batches", "beams", "tokens", "turns", "layers", "threads"):
        given = getattr(args, name)
        if min(given if isinstance(given, list) else [given]) < 1:
            raise OptionError(f"--{name} must be at least 1, got {given}")
    try:
        args.overrides = dict(json.loads(args.overrides))
    except (ValueError, TypeError):
        raise OptionError(
            f'--overrides must be a JSON object, like {{"f_eps": 1e-4}}; got {args.overrides}'
        ) from None
    return args


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each setting."""
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
    if not Path(args.path).is_file():
        raise OptionError(f"--path: there is no checkpoint {args.path}")
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.path], arg_overrides={"data": args.data} | args.overrides
    )
    deq = models[0].eval().to(device)
    stack = build_stack(deq, task, args.layers).to(device)
    for model in (deq, stack):
        model.prepare_for_inference_(cfg)
    blocks = data_utils.load_indexed_dataset(os.path.join(args.data, "valid"), task.source_dictionary)
    if blocks is None:
        raise OptionError(f"{args.data} has no validation text: give fairseq-preprocess a --validpref")
    text = torch.cat([blocks[i] for i in range(len(blocks))]).long()
    settings = list(itertools.product(args.contexts, args.batches, args.beams))
    for length, batch, _ in settings:
        if batch * length > text.numel():
            raise OptionError(
                f"the validation text of {text.numel()} tokens is too short for {batch} contexts of "
                f"{length}; lower --batches or --contexts"
            )
    results = []
    tell(HEADER)
    for length, batch, beam in progress(settings, "settings"):
        context = text[: batch * length].view(batch, length).to(device)
        results.append(setting(args, deq, stack, context, beam))
        tell(row(results[-1]))
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
    return summary(context.shape[1], context.shape[0], beam, rates)


def run(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: an option, the checkpoint or the text cannot be used.
    """
    args = parse(argv)
    torch.set_num_threads(args.threads)
    import_user_dir(args)
    with torch.no_grad():
        results = measure(args)
    settings = {key: str(value) for key, value in vars(args).items()} | {"torch": torch.__version__}
    out = args.out.with_suffix(".json")
    with written_whole(out) as partial:
        partial.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    plot(results, args.layers, args.out.with_suffix(".png"))
    print(f"{out} and {args.out.with_suffix('.png')} written")


main = command_line(PROGRAM, run)
