"""Log-probabilities of raw text, sentence by sentence and word by word.

    python -m fairseq_deq.score DATA --path CHECKPOINT --input text.txt [--bpe ... --tokenizer ...] [--json]

takes the options of fairseq-interactive, and reads one sentence a line. Each is scored by itself, its end
included. It prints, with natural logarithms and tabs between,

    S-0   log-probability   tokens   perplexity a token   the sentence
    W-0   log-probability   word
    ...
    T     log-probability   tokens   perplexity a token   words   perplexity a word

where W lines come once a word (its pieces added up) and T last, over all sentences; with `--json`, one object
a line.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import logging
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils

from .errors import OptionError
from .generation.scoring import SentenceScore, TextScorer, perplexity

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
        OptionError: there is no checkpoint or no text.
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
    for sentences in _read(cfg.interactive.input):
        for score in scorer.score(sentences):
            write.sentence(score)
    write.total()


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


def _read(name: str) -> Iterator[list[str]]:
    """Blocks of lines, without their ends."""
    if name != "-" and not os.path.isfile(name):
        raise OptionError(f"--input: there is no text {name}")
    with contextlib.nullcontext(sys.stdin) if name == "-" else open(name, encoding="utf-8") as lines:
        while block := [line.strip() for line in itertools.islice(lines, _READ_AHEAD)]:
            yield block


class _Writer:
    """Prints scores as they come, and what they add up to."""

    def __init__(self, out: TextIO, as_json: bool) -> None:
        self.out, self.as_json = out, as_json
        self.sentences = self.tokens = self.words = 0
        self.log_prob = 0.0

    def sentence(self, score: SentenceScore) -> None:
        count, name = score.tokens.numel(), self.sentences
        self.sentences += 1
        self.tokens += count
        self.words += len(score.words)
        self.log_prob += score.log_prob
        if self.as_json:
            pieces = [[piece, value] for piece, value in zip(score.pieces, score.log_probs.tolist())]
            self._line(
                {
                    "sentence": score.text,
                    "log_prob": score.log_prob,
                    "tokens": count,
                    "perplexity": score.perplexity,
                    "words": [list(word) for word in score.words],
                    "pieces": pieces,
                }
            )
            return
        self._row(f"S-{name}", f"{score.log_prob:.4f}", count, f"{score.perplexity:.2f}", score.text)
        for word, value in score.words:
            self._row(f"W-{name}", f"{value:.4f}", word)

    def total(self) -> None:
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
                }
            )
        else:
            self._row("T", f"{self.log_prob:.4f}", self.tokens, f"{a_token:.2f}", self.words, f"{a_word:.2f}")

    def _row(self, *cells: Any) -> None:
        print(*cells, sep="\t", file=self.out)

    def _line(self, row: dict[str, Any]) -> None:
        print(json.dumps(row, ensure_ascii=False), file=self.out)


if __name__ == "__main__":
    # What is printed is the result: no news of fairseq's and no advice of hydra's beside it.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s", force=True)
    warnings.filterwarnings("ignore", module="hydra|runpy")
    cli_main()
