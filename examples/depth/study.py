#!/usr/bin/env python3
"""Does more compute help? Perplexity by evaluations of a layer, of three models trained in different ways.

Trains each model with each seed for --updates updates, and evaluates it on the validation text with 1, 2, 4,
... evaluations of its layer at each position (--depths): fairseq-train, fairseq-eval-lm and fairseq-validate,
one run after the other in this process. Prints a table, and draws OUT/depth.png. What OUT/results.json has
already is not run again. `--show` prints the commands instead of running them.

  tied     a stack of the layer 12 times with tied weights
  random   the same, each update with 1 to 23 layers, drawn evenly: 12 in the mean, and 12 in evaluation
  deq      half of the updates as a stack of 4 layers, then at the equilibrium

Each is evaluated in two ways, whatever it was trained as:

  applied  the layer k times, from zero
  solved   its equilibrium by the solver, with k evaluations at most and a tolerance of 1e-6
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fairseq_deq
from fairseq_deq.tools.studies import Results, call, draw_spread, perplexity, spread, step_mib, study_parser

USER_DIR = str(Path(fairseq_deq.__file__).parent)
LAYERS = 12
NEVER = 1000000  # updates of the pretraining: more than there are
MODELS = ("tied", "random", "deq")
DEPTHS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
HIGHEST = 1.2  # of the picture, times the lowest perplexity
# The same for all: the layer, the loss, the tokens, the context of 64, the optimizer and its schedule.
COMMON = (
    *("--task", "language_modeling", "--arch", "deq_transformer_lm_tiny", "--criterion", "deq_lm_loss"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0", "--lr", "0.002"),
    *("--lr-scheduler", "cosine", "--warmup-updates", "50", "--dropout", "0.1", "--tokens-per-sample", "64"),
    *("--batch-size", "8", "--required-batch-size-multiple", "1", "--num-workers", "0"),
    *("--disable-validation", "--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "20"),
)
TEXT = ("--gen-subset", "valid", "--tokens-per-sample", "64", "--batch-size", "32", "--num-workers", "0")
# The look of the curves in the picture: model, way, label, colour, line.
CURVES = (
    ("tied", "applied", "tied: trained as 12 layers", "C1", "-"),
    ("random", "applied", "random: trained as 1 to 23 layers", "C2", "-"),
    ("deq", "solved", "deq: its equilibrium, solved for", "C0", "-"),
    ("deq", "applied", "deq: its layer applied", "C0", ":"),
)


def architecture(model: str, updates: int) -> tuple[str, ...]:
    """The options of fairseq-train that are the model's."""
    if model == "deq":
        return ("--pretrain-layers", "4", "--pretrain-steps", str(updates // 2))
    stack = ("--pretrain-layers", str(LAYERS), "--pretrain-steps", str(NEVER))
    return (*stack, "--pretrain-random-layers", "true") if model == "random" else stack


def deepest(model: Any) -> None:
    """Go to an update that draws as many layers as any."""
    stack, now = model.decoder.stack, model.decoder.num_updates
    model.set_num_updates(next(update for update in itertools.count(now) if stack.at(update) == stack.most))


class Run:
    """One training and its evaluations, with their place in OUT and their figures in OUT/results.json.

    Attributes:
        name: the model and the seed.
    """

    def __init__(self, args: argparse.Namespace, results: Results, model: str, seed: int) -> None:
        self.data, self.depths, self.results = args.data, args.depths, results
        self.name = f"{model}-{seed}"
        self.folder = args.out / self.name
        self.checkpoint = str(self.folder / "checkpoint_last.pt")
        self.training = (
            *(args.data, "--user-dir", USER_DIR, *COMMON, *architecture(model, args.updates)),
            *("--seed", str(seed), "--max-update", str(args.updates), "--save-dir", str(self.folder)),
        )

    def evaluation(self, **options: Any) -> tuple[str, ...]:
        """The arguments of fairseq-eval-lm, with options of the checkpoint changed."""
        changed = ("--model-overrides", str(options)) if options else ()
        return (self.data, "--user-dir", USER_DIR, "--path", self.checkpoint, *TEXT, *changed)

    def evaluations(self) -> dict[str, tuple[str, ...]]:
        """The arguments of each run of fairseq-eval-lm, by the name of its figure."""
        found = {"own": self.evaluation()}
        for k in self.depths:
            found[f"applied-{k}"] = self.evaluation(pretrain_steps=NEVER, pretrain_layers=k)
            found[f"solved-{k}"] = self.evaluation(pretrain_steps=0, f_thres=k, f_eps=1e-6)
        return found

    def validation(self) -> tuple[str, ...]:
        """The arguments of fairseq-validate, which knows the spectral radius at the equilibrium."""
        return (
            *(self.data, "--user-dir", USER_DIR, "--task", "language_modeling", "--path", self.checkpoint),
            *("--valid-subset", "valid", "--batch-size", "32", "--num-workers", "0", "--log-format", "json"),
            *("--model-overrides", str({"pretrain_steps": 0, "spectral_radius": 20})),
        )

    def show(self) -> None:
        """Print the commands."""
        print(shlex.join(("fairseq-train", *self.training)))
        for arguments in self.evaluations().values():
            print(shlex.join(("fairseq-eval-lm", *arguments)))
        print(shlex.join(("fairseq-validate", *self.validation())))

    def measure(self) -> None:
        """Train and evaluate, where that has not been done."""
        self._once("seconds", self._train)
        self._once("mib", lambda: round(step_mib(self.checkpoint, self.data, deepest), 1))
        for figure, arguments in self.evaluations().items():
            self._once(figure, partial(self._perplexity, arguments))
        self._once("radius", self._radius)

    def _once(self, figure: str, measure: Callable[[], float]) -> None:
        value = self.results.once(f"{self.name}/{figure}", measure)
        print(f"{self.name:10s} {figure:12s} {value:8.2f}", flush=True)

    def _train(self) -> float:
        return round(call("fairseq-train", self.training, self.folder / "train.log")[1], 1)

    def _perplexity(self, arguments: Sequence[str]) -> float:
        return perplexity(arguments, self.folder / "eval.log")

    def _radius(self) -> float:
        printed, _ = call("fairseq-validate", self.validation(), self.folder / "validate.log")
        return float(re.findall(r'sradius": "([\d.]+)"', printed)[-1])


def table(results: Results, args: argparse.Namespace) -> str:
    """What came out, in Markdown: means over the seeds, with the smallest and the largest of several."""
    most = args.depths[-1]
    lines = [
        f"| model | as trained | best | at {most} | solved, {most} | radius | MiB | seconds per update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in args.models:
        way = "solved" if model == "deq" else "applied"
        best = min(args.depths, key=lambda k: sum(_values(results, args, model, f"{way}-{k}")))
        seconds = [value / args.updates for value in _values(results, args, model, "seconds")]
        cells = [
            *(spread(_values(results, args, model, figure), ".2f") for figure in ("own", f"{way}-{best}")),
            *(spread(_values(results, args, model, f"{one}-{most}"), ".2f") for one in (way, "solved")),
            *(spread(_values(results, args, model, figure), ".3g") for figure in ("radius", "mib")),
            spread(seconds, ".2g"),
        ]
        cells[1] += f" at {best}"
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", "| evaluations, k |" + "".join(f" {k} |" for k in args.depths)]
    lines += ["|---|" + "---|" * len(args.depths)]
    for model in args.models:
        for way in ("applied", "solved"):
            values = [_values(results, args, model, f"{way}-{k}") for k in args.depths]
            means = "".join(f" {sum(row) / len(row):.2f} |" for row in values)
            lines.append(f"| {model}, {way} |{means}")
    return "\n".join(lines)


def _values(results: Results, args: argparse.Namespace, model: str, figure: str) -> list[float]:
    """The figure of each seed."""
    return [results.figures[f"{model}-{seed}/{figure}"] for seed in args.seeds]


def draw(results: Results, args: argparse.Namespace) -> None:
    """Draw perplexity against evaluations: means over the seeds, in a band from least to most.

    What is far above the best leaves the picture at its top, so that the others can be told apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    low = high = 0.0
    for model, way, label, colour, line in CURVES:
        if model not in args.models:
            continue
        values = [_values(results, args, model, f"{way}-{k}") for k in args.depths]
        draw_spread(axes, args.depths, values, line, color=colour, label=label)
        seen = [value for row in values for value in row]
        low, high = min(low or seen[0], *seen), max(high, *seen)
    if high > HIGHEST * low:
        axes.set_ylim((1 - 0.05 * (HIGHEST - 1)) * low, HIGHEST * low)
    axes.set_xscale("log", base=2)
    axes.set_xticks(args.depths, [str(k) for k in args.depths])
    axes.minorticks_off()
    axes.set_xlabel("evaluations of the layer at each position, k")
    axes.set_ylabel("perplexity on the validation text")
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(args.out / "depth.png", dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        argv: the arguments; those of the process if None.
    """
    parser = study_parser(__doc__ or "", MODELS, MODELS)
    parser.add_argument("--updates", type=int, default=4000, help="of each training (default: 4000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="default: 1 2 4 ... 64")
    args = parser.parse_args(argv)
    args.depths = sorted(args.depths)
    results = Results(args.out / "results.json")
    for seed in args.seeds:
        for model in args.models:
            run = Run(args, results, model, seed)
            run.show() if args.show else run.measure()
    if not args.show:
        print(table(results, args))
        draw(results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
