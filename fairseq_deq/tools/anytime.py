"""Perplexity of a trained DEQ language model by evaluations of its layer, and the words that need most.

Takes the options of fairseq-eval-lm and evaluates the same tokens once for each budget (`--budgets`; by
default 1, 2, 4, ... up to the checkpoint's `--f-thres`), with everything else as in the checkpoint. It prints
one line per budget: the perplexity, the relative residual reached (mean over positions), the share of
positions that converged, and the evaluations of f per position. Then it lists the words (types of the
dictionary) at which the solve with the largest budget took the most evaluations. `--plot` draws the curve.

    fairseq-deq-anytime data-bin/wikitext-103 --path checkpoints/checkpoint_best.pt --gen-subset test \\
        --tokens-per-sample 150 --batch-size 8 --plot anytime.png
    fairseq-deq-anytime quickstart/bin --path quickstart/checkpoints/checkpoint_last.pt --gen-subset valid \\
        --tokens-per-sample 64 --batch-size 32 --budgets 2,4,8,16,40 --json anytime.json

For a memory carried from block to block add --task deq_language_modeling --batch-size 1.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from ..errors import OptionError
from .command import command_line, describe_over_fairseqs, progress, tell, written_whole
from .evaluation import Evaluation, budgets_up_to, evaluate, hardest, require_equilibrium

PROGRAM = "fairseq-deq-anytime"
# The first point is left out of the axis where it is so many times the range of the others above them.
_TOO_HIGH = 1.0
_TOLERANCES = (("rtol", "relative"), ("atol", "absolute"))


def draw(evaluations: Sequence[Evaluation], title: str, out: Path) -> None:
    """Draw perplexity and residual against the budget into a PNG.

    Args:
        evaluations: one per budget, the smallest first.
        title: the conditions that they hold under.
        out: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [evaluation.summary() for evaluation in evaluations]
    budgets = [line["budget"] for line in lines]
    perplexities = [line["perplexity"] for line in lines]
    figure, left = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    right = left.twinx()
    left.plot(budgets, perplexities, "o-", color="C0", zorder=3)
    right.plot(budgets, [line["residual"] for line in lines], "s--", color="C1", alpha=0.8)
    left.set_xscale("log", base=2)
    left.set_xticks(budgets, [str(budget) for budget in budgets])
    left.minorticks_off()
    right.set_yscale("log")
    top = axis_top(perplexities)
    if top is not None:
        # Of the first point only the value is shown, so that the others can be told apart.
        low = min(perplexities[1:])
        left.set_ylim(low - 0.08 * (top - low), top)
        left.annotate(
            f"↑ {perplexities[0]:,.4g}",
            (budgets[0], top),
            xytext=(4, -14),
            textcoords="offset points",
            color="C0",
        )
    left.set_xlabel("evaluations of f at most")
    left.set_ylabel("perplexity", color="C0")
    right.set_ylabel("relative residual, mean over positions", color="C1")
    left.grid(True, alpha=0.3)
    title = "\n".join(textwrap.fill(line, 100) for line in title.splitlines())
    figure.suptitle(title, fontsize="small")
    with written_whole(out) as partial:
        figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)


def axis_top(values: Sequence[float]) -> float | None:
    """Where the axis ends so that the first value does not flatten the others; None where it does not."""
    rest = values[1:]
    if len(rest) < 2:
        return None
    spread = max(max(rest) - min(rest), 1e-3 * max(rest))
    top = max(rest) + 0.15 * spread
    return top if values[0] > max(rest) + _TOO_HIGH * spread else None


def load(cfg: Any) -> tuple[Any, Any]:
    """The model of `--path`, ready for evaluation, and its task with the text loaded.

    Raises:
        ValueError: the options cannot work; the sentence says why.
    """
    if cfg.eval_lm.context_window > 0:
        raise OptionError(f"{PROGRAM} has no --context-window; use --task deq_language_modeling")
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
    ours = describe_over_fairseqs(parser, PROGRAM, __doc__, "DATA --path CHECKPOINT [options]")
    ours.add_argument(
        "--budgets", metavar="N,N", help="numbers of evaluations of f to try (default: 1, 2, 4, ...)"
    )
    ours.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw perplexity and residual against the budget"
    )
    ours.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    ours.add_argument(
        "--words",
        type=int,
        default=20,
        metavar="N",
        help="how many of the hardest words to list (default: 20)",
    )
    ours.add_argument(
        "--occurrences",
        type=int,
        default=5,
        metavar="N",
        help="list only words that occur this often (default: 5)",
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


def conditions(cfg: Any, model: Any, tokens: int) -> dict[str, Any]:
    """What the perplexities hold under."""
    solver = model.decoder.solver
    return {
        "checkpoint": cfg.common_eval.path,
        "data": cfg.task.data,
        "subset": cfg.dataset.gen_subset,
        "tokens": tokens,
        "tokens_per_sample": cfg.task.tokens_per_sample,
        "task": cfg.task._name,
        "solver": solver.solver,
        "rtol": solver.rtol,
        "atol": solver.atol,
    }


def sentence_of(found: dict[str, Any]) -> str:
    """The conditions in words, on two lines."""
    tolerances = [f"{found[name]:g} {kind}" for name, kind in _TOLERANCES if found[name]]
    return (
        f"{found['checkpoint']}, {found['subset']} text of {found['data']}\n"
        f"{found['tokens']:,} tokens in blocks of {found['tokens_per_sample']} ({found['task']}); "
        f"{found['solver']}, tolerance {' + '.join(tolerances)}"
    )


def run(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print, and draw.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError: something cannot work; the sentence says why.
    """
    args = parse(argv)
    cfg = convert_namespace_to_omegaconf(args)
    model, task = load(cfg)
    evaluations: list[Evaluation] = []
    for budget in args.budgets or budgets_up_to(model.decoder.solver.max_evals):
        batches = progress(batches_of(cfg, task, model), f"budget {budget}")
        evaluation = evaluate(model, batches, budget, task.dictionary.pad())
        if not evaluations:
            found = conditions(cfg, model, evaluation.loss.numel())
            tell(f"{sentence_of(found)}\nbudget  perplexity  residual  converged  evaluations")
        line = evaluation.summary()
        tell(
            f"{budget:6d}  {line['perplexity']:10.2f}  {line['residual']:8.2e}  {line['converged']:9.4f}  "
            f"{line['evaluations']:11.2f}"
        )
        evaluations.append(evaluation)
    last = evaluations[-1]
    words = hardest(last, task.source_dictionary, args.words, args.occurrences)
    print(
        f"\nWords read at least {args.occurrences} times, those with the most evaluations first "
        f"(budget {last.budget}):\nevaluations  residual  loss (nats)  times  word"
    )
    for word in words:
        print(
            f"{word.evaluations:11.2f}  {word.residual:8.2e}  {word.loss:11.3f}  {word.count:5d}  {word.word}"
        )
    if args.json is not None:
        summaries = [evaluation.summary() for evaluation in evaluations]
        listed = [dataclasses.asdict(word) for word in words]
        numbers = {"conditions": found, "budgets": summaries, "words": listed}
        with written_whole(args.json) as partial:
            partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(evaluations, sentence_of(found), args.plot)
        print(f"\n{args.plot}")


main = command_line(PROGRAM, run)
