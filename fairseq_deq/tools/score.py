"""Log-probabilities of raw text, sentence by sentence and word by word.

    fairseq-deq-score quickstart/bin --path quickstart/checkpoints/checkpoint_last.pt --input text.txt \\
        --bpe sentencepiece --sentencepiece-model quickstart/text/sentencepiece.model
    echo "We must work together." | fairseq-deq-score DATA --path CHECKPOINT --json

It takes the options of fairseq-interactive, and reads one sentence per line. Each is scored by itself, its
end included. It prints, with natural logarithms and tabs between, a header line that begins with # and names
the columns, and then

    S-0   log-probability   tokens   perplexity per token   the sentence   unknown words
    W-0   log-probability   word   unknown pieces in it
    ...
    T     log-probability   tokens   perplexity per token   words   perplexity per word   unknown words
          share of the positions that converged   mean residual   bits per byte

with one line W per word (its pieces added up), and at the end one line T over all sentences; with `--json`,
one object per line. Tokens are the pieces of a sentence and its end. Bits per byte do not depend on the
pieces, so they compare models of different dictionaries: -log2 of the probability over the bytes of the text
in UTF-8, of which the end of a sentence is one.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, TextIO

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils

from ..errors import OptionError
from ..generation.scoring import SentenceScore, TextScorer, perplexity
from ..generation.text import in_buffers, read_lines
from ..solve_report import SolveReport
from .command import command_line, describe_over_fairseqs, progress

PROGRAM = "fairseq-deq-score"

_HEADER = (
    "# S: log_prob, tokens, perplexity, sentence, unknown\tW: log_prob, word, unknown\tT: log_prob, tokens, "
    "perplexity, words, word_perplexity, unknown, converged, residual, bits_per_byte"
)

# Sentences read before any of them is scored, so that batches can hold sentences of like length.
_READ_AHEAD = 256


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The options: those of fairseq-interactive, and ours.

    Raises:
        OptionError: one is wrong.
    """
    parser = options.get_interactive_generation_parser(default_task="language_modeling")
    ours = describe_over_fairseqs(parser, PROGRAM, __doc__, "DATA --path CHECKPOINT [--input TEXT] [options]")
    ours.add_argument("--json", action="store_true", help="print one JSON object per line")
    ours.add_argument("--no-eos", action="store_true", help="do not score the end of a sentence")
    args: Namespace = options.parse_args_and_arch(parser, list(sys.argv[1:] if argv is None else argv))
    return args


def run(argv: Sequence[str] | None = None) -> None:
    """Score what `--input` names.

    Args:
        argv: the arguments; those of the process if None.
    Raises:
        OptionError, SystemExit: something cannot work; the sentence says why.
    """
    arguments = parse(argv)
    cfg = convert_namespace_to_omegaconf(arguments)
    distributed_utils.call_main(cfg, score, as_json=arguments.json, eos=not arguments.no_eos)


def score(cfg: Any, as_json: bool = False, eos: bool = True, out: TextIO | None = None) -> None:
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
    write = _Writer(out or sys.stdout, as_json, eos)
    name = cfg.interactive.input
    with SolveReport() as solves:
        for sentences in in_buffers(progress(read_lines(name), "sentences"), _READ_AHEAD):
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

    def __init__(self, out: TextIO, as_json: bool, eos: bool) -> None:
        self.out, self.as_json, self.eos = out, as_json, eos
        self.sentences = self.tokens = self.words = self.unknown = self.bytes = 0
        self.log_prob = 0.0
        if not as_json:
            print(_HEADER, file=out)

    def sentence(self, score: SentenceScore) -> None:
        count, name = score.tokens.numel(), self.sentences
        self.sentences += 1
        self.tokens += count
        self.words += len(score.words)
        self.unknown += len(score.unknown)
        self.bytes += len(score.text.encode()) + self.eos
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
        bits_per_byte = -self.log_prob / math.log(2) / self.bytes if self.bytes else math.nan
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
                    "bytes": self.bytes,
                    "bits_per_byte": bits_per_byte,
                }
            )
            return
        self._row(
            *("T", f"{self.log_prob:.4f}", self.tokens, f"{a_token:.2f}", self.words, f"{a_word:.2f}"),
            *(self.unknown, f"{solves.share:.4f}", f"{solves.residual:.1e}", f"{bits_per_byte:.4f}"),
        )

    def _row(self, *cells: Any) -> None:
        print(*cells, sep="\t", file=self.out)

    def _line(self, row: dict[str, Any]) -> None:
        # JSON has no word for NaN and infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        print(json.dumps(finite, ensure_ascii=False, allow_nan=False), file=self.out)


main = command_line(PROGRAM, run)
