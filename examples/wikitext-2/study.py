#!/usr/bin/env python3
"""Equilibrium, tied stack and shallow network: equal parameters, text, tokens, context and search.

Trains each model with every pair of --lr and --dropout for --updates updates, then the best pair anew for
--final-updates, and evaluates each on the validation text: fairseq-train and fairseq-eval-lm, one run after
the other in this process. Prints one line a run: perplexity, processor seconds of the training, and MiB that
one training step of the trained model allocates at its peak, over weights and optimizer. What
OUT/results.json has already is not run again. `--show` prints the commands instead of running them.

  deq      DEQ-Transformer: half of the updates as a stack of 4 layers, then at the equilibrium
  tied     the same layer 12 times with tied weights, trained through all of them
  shallow  fairseq's transformer_lm of one layer, as many parameters
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq_cli import eval_lm, train

import fairseq_deq
from fairseq_deq.tools.probe import peak_mib

USER_DIR = str(Path(fairseq_deq.__file__).parent)
MODELS = ("shallow", "deq", "tied")
# The same for all: the loss, the tokens, the context of 64, the optimizer and its schedule.
COMMON = (
    *("--task", "language_modeling", "--criterion", "deq_lm_loss", "--optimizer", "adam"),
    *("--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0", "--lr-scheduler", "cosine"),
    *("--warmup-updates", "50", "--tokens-per-sample", "64", "--batch-size", "8", "--num-workers", "0"),
    *("--required-batch-size-multiple", "1", "--disable-validation", "--no-epoch-checkpoints"),
    *("--log-format", "json", "--log-interval", "20", "--seed", "1"),
)
DEQ = ("--arch", "deq_transformer_lm_tiny")
# 264,064 parameters beside the embeddings, where the layer of the other two has 263,552.
SHALLOW = (
    *("--arch", "transformer_lm", "--decoder-layers", "1", "--decoder-attention-heads", "4"),
    *("--decoder-ffn-embed-dim", "768", "--decoder-embed-dim", "128", "--decoder-input-dim", "128"),
    *("--decoder-output-dim", "128", "--share-decoder-input-output-embed"),
)
EVALUATION = (
    "--gen-subset",
    "valid",
    "--tokens-per-sample",
    "64",
    "--batch-size",
    "32",
    "--num-workers",
    "0",
)


def architecture(model: str, updates: int) -> tuple[str, ...]:
    """The options of fairseq-train that are the model's."""
    if model == "shallow":
        return SHALLOW
    if model == "tied":
        return (*DEQ, "--pretrain-layers", "12", "--pretrain-steps", "1000000")
    return (*DEQ, "--pretrain-layers", "4", "--pretrain-steps", str(updates // 2))


def call(tool: str, arguments: Sequence[str], log: Path) -> tuple[str, float]:
    """Run a tool of fairseq here; what it printed and logged, and the processor seconds that it took."""
    main = {"fairseq-train": train.cli_main, "fairseq-eval-lm": eval_lm.cli_main}[tool]
    # fairseq keeps the best score of a run on its functions, where the next run would find it.
    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        if hasattr(function, "best"):
            del function.best
    stream, root, before = io.StringIO(), logging.getLogger(), sys.argv
    handlers = root.handlers
    root.handlers, sys.argv = [logging.StreamHandler(stream)], [tool, *arguments]
    root.setLevel(logging.INFO)
    begin = time.process_time()
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            main()
    finally:
        root.handlers, sys.argv = handlers, before
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(stream.getvalue(), encoding="utf-8")
    return stream.getvalue(), time.process_time() - begin


def step_mib(checkpoint: str, data: str) -> float:
    """MiB at the peak of a training step of the model in `checkpoint`, on a batch of the validation text."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], {"data": data})
    criterion = task.build_criterion(cfg.criterion)
    task.load_dataset("valid")
    batches = task.get_batch_iterator(
        task.dataset("valid"), max_sentences=cfg.dataset.batch_size, data_buffer_size=0
    )
    (batch, *_) = batches.next_epoch_itr(shuffle=False)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss, *_ = criterion(model, batch)
        loss.backward()

    step()  # what is made once, is made
    return peak_mib(step, cuda=False)


class Study:
    """Runs, each with its place in OUT and its line in OUT/results.json."""

    def __init__(self, data: str, out: Path, show: bool) -> None:
        self.data, self.out, self.show = data, out, show
        self.file = out / "results.json"
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, model: str, updates: int, lr: float, dropout: float) -> float:
        """Train and evaluate; the perplexity on the validation text."""
        name = f"{model}-{updates}-{lr:g}-{dropout:g}"
        training = (
            *(self.data, "--user-dir", USER_DIR, *COMMON, *architecture(model, updates), "--lr", f"{lr:g}"),
            *("--dropout", f"{dropout:g}", "--max-update", str(updates), "--save-dir", str(self.out / name)),
        )
        checkpoint = str(self.out / name / "checkpoint_last.pt")
        evaluation = (self.data, "--user-dir", USER_DIR, "--path", checkpoint, *EVALUATION)
        if self.show:
            print(shlex.join(["fairseq-train", *training]))
            print(shlex.join(["fairseq-eval-lm", *evaluation]))
            return 0.0
        if name not in self.results:
            _, seconds = call("fairseq-train", training, self.out / name / "train.log")
            printed, _ = call("fairseq-eval-lm", evaluation, self.out / name / "eval.log")
            (perplexity,) = re.findall(r"Perplexity: ([\d.]+)", printed)
            logging.disable(logging.INFO)
            memory = step_mib(checkpoint, self.data)
            logging.disable(logging.NOTSET)
            self.results[name] = {
                "perplexity": float(perplexity),
                "seconds": round(seconds, 1),
                "mib": round(memory, 1),
            }
            self.file.write_text(json.dumps(self.results, indent=1) + "\n")
        result = self.results[name]
        figures = "perplexity {perplexity:8.2f}  {seconds:7.1f} s  {mib:6.1f} MiB".format(**result)
        print(f"{name:28s} {figures}", flush=True)
        return result["perplexity"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        argv: the arguments; those of the process if None.
    """
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="study.py",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="the folder that fairseq-preprocess wrote")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints, logs and results.json"
    )
    parser.add_argument("--updates", type=int, default=300, help="of each run of the search (default: 300)")
    parser.add_argument("--final-updates", type=int, default=2000, help="of the last run (default: 2000)")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.002, 0.005], help="default: 0.002 0.005")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="default: 0 0.1")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--show", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    study = Study(args.data, args.out, args.show)
    for model in args.models:
        search = [
            (study.run(model, args.updates, lr, dropout), lr, dropout)
            for lr in args.lr
            for dropout in args.dropout
        ]
        _, lr, dropout = min(search)
        study.run(model, args.final_updates, lr, dropout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
