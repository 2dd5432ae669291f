#!/usr/bin/env python3
"""One set of weights, applied a fixed number of times and solved: does it work beyond the trained length?

Trains the layer of a DEQ-TrellisNet on products of permutations (the task `word_problem`, group S3), words of
--word-len, with each seed: --pretrain-updates as a stack of --layers with tied weights, then
--equilibrium-updates at its equilibrium. Evaluates the same checkpoint on words of other lengths (--lengths):
its layer applied --layers times, twice and four times as often, and its equilibrium, solved for. Prints a
table of the share of right answers in the last quarter of the words, and draws OUT/lengths.png:
fairseq-train and fairseq-validate, one run after the other in this process. What OUT/results.json has already
is not run again. `--show` prints the commands instead of running them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import fairseq_deq
from fairseq_deq.tools.studies import Results, call, draw_spread, spread, study_parser

USER_DIR = str(Path(fairseq_deq.__file__).parent)
NEVER = 1000000  # updates of the first phase: more than there are
SOLVED = "equilibrium"
GUESS = 1 / 6  # S3 has 6 elements
TASK = ("--user-dir", USER_DIR, "--task", "word_problem", "--group", "S3")
BATCHES = ("--batch-size", "64", "--required-batch-size-multiple", "1", "--num-workers", "0")
LAYER = (
    *("--arch", "deq_trellisnet_lm", "--criterion", "deq_lm_loss"),
    *("--decoder-embed-dim", "32", "--nhid", "32", "--init-std", "0.1"),
)
TRAINING = (
    *("--optimizer", "adam", "--clip-norm", "1.0", "--lr", "0.01", "--train-size", "100000"),
    *("--log-interval", "100", "--disable-validation", "--no-epoch-checkpoints"),
)


def ways(layers: int) -> dict[str, dict[str, int]]:
    """How a checkpoint is evaluated: the options of the model that differ, by a name."""
    applied = {
        f"applied {k} times": {"pretrain_steps": NEVER, "pretrain_layers": k}
        for k in (layers, 2 * layers, 4 * layers)
    }
    return {**applied, SOLVED: {"pretrain_steps": 0}}


def training(args: argparse.Namespace, seed: int) -> tuple[str, ...]:
    """The arguments of fairseq-train."""
    updates = args.pretrain_updates + args.equilibrium_updates
    return (
        *(*TASK, "--word-len", str(args.word_len), *LAYER),
        *("--pretrain-layers", str(args.layers), "--pretrain-steps", str(args.pretrain_updates)),
        *(*TRAINING, *BATCHES, "--max-update", str(updates), "--seed", str(seed)),
        *("--save-dir", str(args.out / str(seed))),
    )


def evaluation(args: argparse.Namespace, seed: int, way: str, length: int) -> tuple[str, ...]:
    """The arguments of fairseq-validate."""
    checkpoint = str(args.out / str(seed) / "checkpoint_last.pt")
    return (
        *(*TASK, "--word-len", str(length), "--valid-size", str(args.words), "--valid-subset", "test"),
        *("--path", checkpoint, *BATCHES, "--model-overrides", str(ways(args.layers)[way])),
    )


def last_accuracy(arguments: Sequence[str], log: Path) -> float:
    """The share of right answers in the last quarter of the words.

    Args:
        arguments: of fairseq-validate.
        log: file to write what it printed and logged to.
    """
    printed, _ = call("fairseq-validate", (*arguments, "--log-format", "json"), log)
    return float(re.findall(r'last_accuracy": "([\d.]+)"', printed)[-1])


def train(args: argparse.Namespace, seed: int) -> float:
    """Train; the processor seconds that it took."""
    return round(call("fairseq-train", training(args, seed), args.out / str(seed) / "train.log")[1], 1)


def measure(args: argparse.Namespace, results: Results, seed: int) -> None:
    """Train and evaluate, where that has not been done."""
    folder = args.out / str(seed)
    seconds = results.once(f"{seed}/seconds", lambda: train(args, seed))
    print(f"seed {seed}: trained in {seconds} s of processor time", flush=True)
    for way in ways(args.layers):
        row = []
        for length in args.lengths:
            arguments = evaluation(args, seed, way, length)
            found = partial(last_accuracy, arguments, folder / "test.log")
            row.append(results.once(f"{seed}/{way}/{length}", found))
        print(f"seed {seed}: {way:18s}", *(f"{value:.3f}" for value in row), flush=True)


def curves(args: argparse.Namespace, results: Results) -> dict[str, list[list[float]]]:
    """The share of right answers by way, by length and by seed."""
    return {
        way: [[results.figures[f"{seed}/{way}/{length}"] for seed in args.seeds] for length in args.lengths]
        for way in ways(args.layers)
    }


def table(args: argparse.Namespace, results: Results) -> str:
    """What came out, in Markdown: means over the seeds, with the smallest and the largest of several."""
    lines = ["| the same weights |" + "".join(f" {length} |" for length in args.lengths)]
    lines.append("|---|" + "---|" * len(args.lengths))
    for way, by_length in curves(args, results).items():
        cells = [f" {spread(seeds, '.3f')} |" for seeds in by_length]
        lines.append(f"| {way} |" + "".join(cells))
    return "\n".join(lines)


def draw(args: argparse.Namespace, results: Results) -> None:
    """Draw the share of right answers by length: means over the seeds, in a band from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (way, by_length) in enumerate(curves(args, results).items()):
        colour = "C0" if way == SOLVED else f"C{number + 1}"
        width = 2.5 if way == SOLVED else 1.5
        draw_spread(axes, args.lengths, by_length, color=colour, linewidth=width, label=way)
    axes.axhline(GUESS, color="grey", linestyle=":", label="guessing")
    axes.axvline(args.word_len, color="grey", linewidth=0.8)
    axes.annotate("trained on this length", (args.word_len, 0.5), rotation=90, ha="right", va="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(args.lengths, [str(length) for length in args.lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("length of the words")
    axes.set_ylabel("right answers in their last quarter")
    axes.grid(True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(args.out / "lengths.png", dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        argv: the arguments; those of the process if None.
    """
    parser = study_parser(__doc__ or "")
    parser.add_argument("--word-len", type=int, default=16, help="trained length (default: 16)")
    parser.add_argument("--layers", type=int, default=16, help="of the first phase (default: 16)")
    parser.add_argument("--pretrain-updates", type=int, default=600, help="of the first phase (default: 600)")
    parser.add_argument("--equilibrium-updates", type=int, default=100, help="after it (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="default: 8 16 32 64 128"
    )
    parser.add_argument("--words", type=int, default=256, help="words of each evaluation (default: 256)")
    args = parser.parse_args(argv)
    args.lengths = sorted(args.lengths)
    results = Results(args.out / "results.json")
    for seed in args.seeds:
        if args.show:
            print(shlex.join(("fairseq-train", *training(args, seed))))
            for way in ways(args.layers):
                for length in args.lengths:
                    print(shlex.join(("fairseq-validate", *evaluation(args, seed, way, length))))
        else:
            measure(args, results, seed)
    if not args.show:
        print(table(args, results))
        draw(args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
