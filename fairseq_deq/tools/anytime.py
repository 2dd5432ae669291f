#!/usr/bin/env python3
"""Perplexity of a trained DEQ language model against the budget of iterations, and the words that need most.

Takes the options of fairseq-eval-lm and evaluates the same tokens once for each budget (`--budgets`; by
default 1, 2, 4, ... up to the checkpoint's `--f-thres`), with everything else as in the checkpoint. It prints
one line a budget: the perplexity, the relative residual reached (mean over positions), the share of positions
that converged, and the evaluations of f that a position took. Then it lists the words (types of the
dictionary) at which the solve with the largest budget took the most evaluations. `--plot` draws the curve.

    python scripts/anytime.py data-bin/wikitext-103 --path checkpoints/checkpoint_best.pt --gen-subset test \\
        --tokens-per-sample 150 --batch-size 8 --plot anytime.png

For a memory carried from block to block add --task deq_language_modeling --batch-size 1.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fairseq_deq  # noqa: F401  (registers the models)
from fairseq_deq.errors import OptionError
from fairseq_deq.tools.evaluation import Evaluation, budgets_up_to, evaluate, hardest, require_equilibrium


def draw(evaluations: Sequence[Evaluation], out: Path) -> None:
    """Draw perplexity and residual against the budget into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [evaluation.summary() for evaluation in evaluations]
    budgets = [line["budget"] for line in lines]
    figure, left = pyplot.subplots(figsize=(6, 4))
    right = left.twinx()
    left.plot(budgets, [line["perplexity"] for line in lines], "o-", color="C0")
    right.plot(budgets, [line["residual"] for line in lines], "s--", color="C1")
    left.set_xscale("log", base=2)
    left.set_xticks(budgets, [str(budget) for budget in budgets])
    left.set_yscale("log")
    right.set_yscale("log")
    left.set_xlabel("evaluations of f at most")
    left.set_ylabel("perplexity", color="C0")
    right.set_ylabel("relative residual", color="C1")
    left.grid(True, alpha=0.3, which="both")
    figure.tight_layout()
    partial = out.with_name(f".{out.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)
    os.replace(partial, out)


def load(cfg: Any) -> tuple[Any, Any]:
    """The model of `--path`, ready for evaluation, and its task with the text loaded.

    Raises:
        ValueError: the options cannot work; the sentence says why.
    """
    if cfg.eval_lm.context_window > 0:
        raise OptionError("anytime.py has no --context-window; use --task deq_language_modeling")
    if not cfg.common_eval.path:
        raise OptionError("--path is needed: the checkpoint to evaluate")
    task = tasks.setup_task(cfg.task)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path],
        arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides.strip()),
        suffix=cfg.checkpoint.checkpoint_suffix,
        task=task,
    )
    model = models[0].eval()
    require_equilibrium(model, cfg.common_eval.path)
    if torch.cuda.is_available() and not cfg.common.cpu:
        model.cuda()
    task.load_dataset(cfg.dataset.gen_subset)
    return model, task


def batches_of(cfg: Any, task: Any, model: Any) -> Iterable[dict[str, Any]]:
    """A pass over the text, with fairseq-eval-lm's batches."""
    return task.eval_lm_dataloader(
        dataset=task.dataset(cfg.dataset.gen_subset),
        max_tokens=cfg.dataset.max_tokens or 36000,
        batch_size=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(model.max_positions()),
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options: those of fairseq-eval-lm, and ours.

    Raises:
        ValueError: one of ours is wrong.
    """
    parser = options.get_eval_lm_parser()
    description, _, details = (__doc__ or "").partition("\n\n")
    parser.prog, parser.description, parser.epilog = "anytime.py", description, details
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    ours = parser.add_argument_group("anytime.py")
    ours.add_argument("--budgets", metavar="N,N", help="evaluations of f to allow (default: 1, 2, 4, ...)")
    ours.add_argument("--plot", type=Path, metavar="PNG", help="draw perplexity and residual")
    ours.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    ours.add_argument("--words", type=int, default=20, metavar="N", help="words to list (default: 20)")
    ours.add_argument(
        "--occurrences", type=int, default=5, metavar="N", help="leave rarer words out (default: 5)"
    )
    args = options.parse_args_and_arch(parser, list(sys.argv[1:] if argv is None else argv))
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise OptionError(f"--plot {args.plot}: the picture is a PNG, so its name must end in .png")
    if args.budgets is not None:
        try:
            args.budgets = sorted({int(budget) for budget in args.budgets.split(",")})
        except ValueError:
            args.budgets = [0]
        if args.budgets[0] < 1:
            raise OptionError("--budgets must be numbers of at least 1 with commas between, like 1,2,4,30")
    return args


def run(argv: Sequence[str] | None) -> None:
    """Evaluate, print, and draw."""
    args = parse(argv)
    cfg = convert_namespace_to_omegaconf(args)
    model, task = load(cfg)
    solver = model.decoder.solver
    print(
        f"{cfg.common_eval.path}, {cfg.dataset.gen_subset}: {solver.solver}, relative tolerance "
        f"{solver.rtol:g}, absolute {solver.atol:g}, blocks of {cfg.task.tokens_per_sample}"
    )
    print("budget  perplexity  residual  converged  evaluations", flush=True)
    evaluations = []
    for budget in args.budgets or budgets_up_to(solver.max_evals):
        evaluation = evaluate(model, batches_of(cfg, task, model), budget, task.dictionary.pad())
        line = evaluation.summary()
        print(
            f"{budget:6d}  {line['perplexity']:10.2f}  {line['residual']:8.2e}  {line['converged']:9.4f}  "
            f"{line['evaluations']:11.2f}",
            flush=True,
        )
        evaluations.append(evaluation)
    last = evaluations[-1]
    words = hardest(last, task.source_dictionary, args.words, args.occurrences)
    print(
        f"\n{last.loss.numel():,} tokens. Words read at least {args.occurrences} times, those with the most "
        f"evaluations first (budget {last.budget}):\nevaluations  residual  loss (nats)  times  word"
    )
    for word in words:
        print(
            f"{word.evaluations:11.2f}  {word.residual:8.2e}  {word.loss:11.3f}  {word.count:5d}  {word.word}"
        )
    if args.json is not None:
        summaries = [evaluation.summary() for evaluation in evaluations]
        numbers = {"budgets": summaries, "words": [dataclasses.asdict(word) for word in words]}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(evaluations, args.plot)
        print(f"\n{args.plot}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit status: 0, or 1 after one sentence that says what is wrong.
    """
    try:
        run(argv)
    except (OptionError, OSError) as error:
        print(f"anytime.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
