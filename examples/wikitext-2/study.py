#!/usr/bin/env python3
"""Equilibrium, tied stack and shallow network: equal parameters, text, tokens, context and search.

Trains each model with every pair of --lr and --dropout for --updates updates, then the best pair anew for
--final-updates; where there is one pair, that alone. Evaluates each on the validation text: fairseq-train and
fairseq-eval-lm, one run after the other in this process. Prints one line per run: perplexity, processor
seconds of the training, and MiB that one training step of the trained model allocates at its peak, over
weights and optimizer. What OUT/results.json has already is not run again. `--show` prints the commands
instead of running them.

  deq      DEQ-Transformer: half of the updates as a stack of 4 layers, then at the equilibrium
  tied     the same layer 12 times with tied weights, trained through all of them
  shallow  fairseq's transformer_lm of one layer, as many parameters
  mini     as deq, with the layer of deq_transformer_lm_mini; only where --models names it
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fairseq_deq
from fairseq_deq.tools.studies import Results, call, perplexity, step_mib, study_parser

USER_DIR = str(Path(fairseq_deq.__file__).parent)
MODELS = ("shallow", "deq", "tied", "mini")
# The same for all: the loss, the tokens, the context of 64, the optimizer and its schedule.
COMMON = (
    *("--task", "language_modeling", "--criterion", "deq_lm_loss", "--optimizer", "adam"),
    *("--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0", "--lr-scheduler", "cosine"),
    *("--warmup-updates", "50", "--tokens-per-sample", "64", "--batch-size", "8", "--num-workers", "0"),
    *("--required-batch-size-multiple", "1", "--disable-validation", "--no-epoch-checkpoints"),
    *("--log-format", "json", "--log-interval", "20"),
)
DEQ = ("--arch", "deq_transformer_lm_tiny")
# 264,128 parameters beside the embeddings.
MINI = ("--arch", "deq_transformer_lm_mini")
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
    first = (*MINI, "--pretrain-layers", "1") if model == "mini" else (*DEQ, "--pretrain-layers", "4")
    return (*first, "--pretrain-steps", str(updates // 2))


class Study:
    """Runs, each with its place in OUT and its line in OUT/results.json."""

    def __init__(self, data: str, out: Path, seed: int, show: bool) -> None:
        self.data, self.out, self.seed, self.show = data, out, seed, show
        self.results = Results(out / "results.json")

    def run(self, model: str, updates: int, lr: float, dropout: float) -> float:
        """Train and evaluate; the perplexity on the validation text."""
        name = f"{model}-{updates}-{lr:g}-{dropout:g}" + (f"-seed{self.seed}" if self.seed != 1 else "")
        training = (
            *(self.data, "--user-dir", USER_DIR, *COMMON, *architecture(model, updates), "--lr", f"{lr:g}"),
            *("--dropout", f"{dropout:g}", "--max-update", str(updates), "--seed", str(self.seed)),
            *("--save-dir", str(self.out / name)),
        )
        checkpoint = str(self.out / name / "checkpoint_last.pt")
        evaluation = (self.data, "--user-dir", USER_DIR, "--path", checkpoint, *EVALUATION)
        if self.show:
            print(shlex.join(["fairseq-train", *training]))
            print(shlex.join(["fairseq-eval-lm", *evaluation]))
            return 0.0

        def measure() -> dict[str, Any]:
            _, seconds = call("fairseq-train", training, self.out / name / "train.log")
            found = perplexity(evaluation, self.out / name / "eval.log")
            memory = step_mib(checkpoint, self.data)
            return {"perplexity": found, "seconds": round(seconds, 1), "mib": round(memory, 1)}

        result = self.results.once(name, measure)
        figures = "perplexity {perplexity:8.2f}  {seconds:7.1f} s  {mib:6.1f} MiB".format(**result)
        print(f"{name:28s} {figures}", flush=True)
        return float(result["perplexity"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        argv: the arguments; those of the process if None.
    """
    parser = study_parser(__doc__ or "", MODELS, MODELS[:3])
    parser.add_argument("--updates", type=int, default=300, help="of each run of the search (default: 300)")
    parser.add_argument("--final-updates", type=int, default=2000, help="of the last run (default: 2000)")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.002, 0.005], help="default: 0.002 0.005")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="default: 0 0.1")
    parser.add_argument("--seed", type=int, default=1, help="of every run (default: 1)")
    args = parser.parse_args(argv)
    study = Study(args.data, args.out, args.seed, args.show)
    pairs = [(lr, dropout) for lr in args.lr for dropout in args.dropout]
    for model in args.models:
        best = pairs[0]
        if len(pairs) > 1:
            best = min(pairs, key=lambda pair: study.run(model, args.updates, *pair))
        study.run(model, args.final_updates, *best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
