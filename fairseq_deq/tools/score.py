"""Log-probabilities of raw text, sentence by sentence and word by word.

    python -m fairseq_deq.score DATA --path CHECKPOINT --input text.txt [--bpe ... --tokenizer ...] [--json]

takes the options of fairseq-interactive, and reads one sentence a line. Each is scored by itself, its end
included. It prints, with natural logarithms and tabs between, a header line that begins with # and names the
columns, and then

    S-0   log-probability   tokens   perplexity a token   the sentence   unknown words
    W-0   log-probability   word   unknown pieces in it
    ...
    T     log-probability   tokens   perplexity a token   words   perplexity a word   unknown words
          share of the positions that converged   mean residual

where W lines come once a word (its pieces added up) and T last, on one line, over all sentences; with
`--json`, one object a line. Tokens are the pieces of a sentence and its end.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import os
import sys
import warnings
from argparse import ArgumentParser
from typing import Any, TextIO

import torch

from ._requirements import require_fairseq_or_exit

if __name__ == "__main__":
    require_fairseq_or_exit()

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils

from .errors import OptionError
from .generation.scoring import SentenceScore, TextScorer, perplexity
from .generation.text import in_buffers, read_lines
from .solve_report import SolveReport

_HEADER = (
    "# S: log_prob, tokens, perplexity, sentence, unknown\tW: log_prob, word, unknown\tT: log_prob, tokens, "
    "perplexity, words, word_perplexity, unknown, converged, residual"
)

# Sentences read before any of them is scored, so that batches can hold sentences of like length.
_READ_AHEAD = 256


def cli_main() -> None:
    """Score what `--input` names."""
    parser: ArgumentParser = options.get_interactive_generation_parser(default_task="language_modeling")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--no-eos", action="store_true", help="leave out the end of a sentence")
    arguments = options.parse_args_and_arch(parser)
    cfg = convert_namespace_to_omegaconf(arguments)
    distributed_utils.call_main(cfg, main, as_json=arguments.json, eos=not arguments.no_eos)


def main(cfg: Any, as_json: bool = False, eos: bool = True, out: TextIO | None = None) -> None:
    """Score the sentences of `cfg.interactive.input`.

    Args:
        cfg: fairseq's configuration.
        as_json: whether to print JSON.
        eos: whether the end of a sentence counts.
        out: where to print; standard output if None.
    Raises:
        OptionError: there is no checkpoint, no text or nothing in it, or the layer is not finite.
    """
    if not cfg.common_eval.path:
        raise OptionError("--path must name a checkpoint")
    task = tasks.setup_task(cfg.task)
    models = _models(cfg, task)
    scorer = TextScorer(
        task,
        models,
        task.build_tokenizer(cfg.tokenizer),
        task.build_bpe(cfg.bpe),
        max_tokens=cfg.dataset.max_tokens or 4096,
        eos=eos,
    )
    write = _Writer(out or sys.stdout, as_json)
    name = cfg.interactive.input
    with SolveReport() as solves:
        for sentences in in_buffers(read_lines(name), _READ_AHEAD):
            for score in scorer.score(sentences):
                write.sentence(score)
    if write.tokens == 0:
        raise OptionError(f"--input: {'standard input' if name == '-' else name} has nothing to score")
    write.total(solves)
    solves.log()


def _models(cfg: Any, task: Any) -> list[Any]:
    models, _ = checkpoint_utils.load_model_ensemble(
        utils.split_paths(cfg.common_eval.path),
        arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides),
        task=task,
        suffix=cfg.checkpoint.checkpoint_suffix,
    )
    for model in models:
        if cfg.common.fp16:
            model.half()
        if torch.cuda.is_available() and not cfg.common.cpu:
            model.cuda()
        model.prepare_for_inference_(cfg)
    return models


class _Writer:
    """Prints scores as they come, and what they add up to."""

    def __init__(self, out: TextIO, as_json: bool) -> None:
        self.out, self.as_json = out, as_json
        self.sentences = self.tokens = self.words = self.unknown = 0
        self.log_prob = 0.0
        if not as_json:
            print(_HEADER, file=out)

    def sentence(self, score: SentenceScore) -> None:
        count, name = score.tokens.numel(), self.sentences
        self.sentences += 1
        self.tokens += count
        self.words += len(score.words)
        self.unknown += len(score.unknown)
        self.log_prob += score.log_prob
        if self.as_json:
            pieces = [[piece, value] for piece, value in zip(score.pieces, score.log_probs.tolist())]
            self._line(
                {
                    "sentence": score.text,
                    "log_prob": score.log_prob,
                    "tokens": count,
                    "perplexity": score.perplexity,
                    "unknown": score.unknown,
                    "words": [list(word) for word in score.words],
                    "pieces": pieces,
                }
            )
            return
        perplexity_of_it = f"{score.perplexity:.2f}"
        self._row(
            f"S-{name}", f"{score.log_prob:.4f}", count, perplexity_of_it, score.text, len(score.unknown)
        )
        for (word, value), unknown in zip(score.words, score.unknown_in_words):
            self._row(f"W-{name}", f"{value:.4f}", word, unknown)

    def total(self, solves: SolveReport) -> None:
        a_token = perplexity(self.log_prob, self.tokens)
        a_word = perplexity(self.log_prob, self.words)
        if self.as_json:
            self._line(
                {
                    "sentences": self.sentences,
                    "log_prob": self.log_prob,
                    "tokens": self.tokens,
                    "perplexity": a_token,
                    "words": self.words,
                    "word_perplexity": a_word,
                    "unknown": self.unknown,
                    "converged": solves.share,
                    "residual": solves.residual,
                }
            )
            return
        self._row(
            *("T", f"{self.log_prob:.4f}", self.tokens, f"{a_token:.2f}", self.words, f"{a_word:.2f}"),
            *(self.unknown, f"{solves.share:.4f}", f"{solves.residual:.1e}"),
        )

    def _row(self, *cells: Any) -> None:
        print(*cells, sep="\t", file=self.out)

    def _line(self, row: dict[str, Any]) -> None:
        # JSON has no word for NaN and infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        print(json.dumps(finite, ensure_ascii=False, allow_nan=False), file=self.out)


if __name__ == "__main__":
    # What is printed is the result: no news of fairseq's and no advice of hydra's beside it.
    os.environ.setdefault("LOGLEVEL", "WARNING")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s", force=True)
    warnings.filterwarnings("ignore", module="hydra|runpy")
    cli_main()
