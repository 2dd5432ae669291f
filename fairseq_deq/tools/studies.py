"""What a study of several trainings is made of: runs of tools, figures in a file, memory of a step."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils

from .probe import peak_mib


def call(tool: str, arguments: Sequence[str], log: Path) -> tuple[str, float]:
    """Run a command in this process, which saves the seconds of a start.

    Args:
        tool: its name: `fairseq-train` and the like, or one of ours, `fairseq-deq-anytime` and the like.
        arguments: what follows on the command line.
        log: file to write what it printed and logged to.
    Returns:
        what it printed and logged, and the processor seconds that it took.
    Raises:
        RuntimeError: it ended with another status than 0.
    """
    main, state = _main_of(tool)
    # fairseq keeps the best score of a run on its functions, where the next run would find it.
    for function in (checkpoint_utils.save_checkpoint, state):
        if hasattr(function, "best"):
            del function.best
    stream, root, before = io.StringIO(), logging.getLogger(), sys.argv
    handlers, level = root.handlers, root.level
    root.handlers, sys.argv = [logging.StreamHandler(stream)], [tool, *arguments]
    root.setLevel(logging.INFO)
    begin = time.process_time()
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            status = main()
    finally:
        root.handlers, sys.argv = handlers, before
        root.setLevel(level)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(stream.getvalue(), encoding="utf-8")
    if status:
        raise RuntimeError(f"{tool} ended with status {status}; see {log}")
    return stream.getvalue(), time.process_time() - begin


def perplexity(arguments: Sequence[str], log: Path) -> float:
    """What fairseq-eval-lm says, per token.

    Args:
        arguments: of the command.
        log: file to write what it printed and logged to.
    """
    printed, _ = call("fairseq-eval-lm", arguments, log)
    (found,) = re.findall(r"Perplexity: ([\d.]+)", printed)
    return float(found)


def study_parser(
    description: str, models: Sequence[str] = (), default: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The arguments that every study has, --out and --show; with several models, --models and a text too.

    Args:
        description: of the study, its first line for the usage.
        models: the models that can be asked for; none where the study has one model, on data that it draws.
        default: those that are trained where none is named.
    """
    first, _, details = description.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="study.py",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if models:
        parser.add_argument("data", help="the folder that fairseq-preprocess wrote")
        parser.add_argument(
            "--models", nargs="+", choices=models, default=list(default), help=f"default: {' '.join(default)}"
        )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints, logs, results.json and pictures"
    )
    parser.add_argument("--show", action="store_true", help="print the commands, run nothing")
    return parser


def spread(values: Sequence[float], digits: str) -> str:
    """The mean of the seeds' figures, with the smallest and the largest of several.

    Args:
        values: one per seed.
        digits: how a number is written, as `format` has it.
    """
    mean, least, most = (
        format(value, digits) for value in (sum(values) / len(values), min(values), max(values))
    )
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


def draw_spread(
    axes: Any, places: Sequence[float], values: Sequence[Sequence[float]], line: str = "-", **look: Any
) -> None:
    """Draw a curve of means over the seeds, in a band from the smallest to the largest.

    Args:
        axes: matplotlib's.
        places: along the x axis.
        values: by place, one per seed.
        line: style of the curve, as matplotlib has it.
        look: of the curve, `color` at least, as `plot` takes it.
    """
    axes.plot(places, [sum(row) / len(row) for row in values], line, marker="o", markersize=4, **look)
    least, most = [min(row) for row in values], [max(row) for row in values]
    axes.fill_between(places, least, most, color=look["color"], alpha=0.2)


def _main_of(tool: str) -> tuple[Callable[[], int | None], Any]:
    """The function behind a command, and the one on which fairseq keeps its patience, if it has one."""
    name = tool.removeprefix("fairseq-").replace("-", "_")
    if name.startswith("deq_"):
        return importlib.import_module(f"{__package__}.{name.removeprefix('deq_')}").main, None
    module = importlib.import_module(f"fairseq_cli.{name}")
    return module.cli_main, getattr(module, "should_stop_early", None)


def step_mib(checkpoint: str, data: str, prepare: Callable[[Any], None] | None = None) -> float:
    """MiB at the peak of a training step of a trained model, over weights and optimizer.

    Args:
        checkpoint: path of the model.
        data: the folder that fairseq-preprocess wrote; the step is on a batch of its validation text.
        prepare: told the model, in training mode, before the step; None: nothing to prepare.
    """
    with _silence():
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], {"data": data})
        task.load_dataset("valid")
    criterion = task.build_criterion(cfg.criterion)
    batches = task.get_batch_iterator(
        task.dataset("valid"), max_sentences=cfg.dataset.batch_size, data_buffer_size=0
    )
    (batch, *_) = batches.next_epoch_itr(shuffle=False)
    model.train()
    if prepare is not None:
        prepare(model)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss, *_ = criterion(model, batch)
        loss.backward()

    step()  # what is made once, is made
    return peak_mib(step, cuda=False)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what fairseq logs of its progress."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


class Results:
    """Figures by name in a JSON file; what is there is not measured again.

    Args:
        file: where they are, and are written to.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure of this name, measured and written if it is not there yet.

        Args:
            name: of the figure.
            measure: returns it, as JSON can hold it.
        """
        if name not in self.figures:
            self.figures[name] = measure()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        return self.figures[name]
