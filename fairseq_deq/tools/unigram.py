"""Compute the perplexity of a unigram model, as a baseline for the perplexity of fairseq-eval-lm.

The unigram model gives every token the same probability everywhere, from how often it occurs in the training
text. Any model that has learnt something of the order of words must be below it.

    p(w) = (n(w) + alpha) / (N + alpha V)

where n(w) counts w in the training text, N is the length of that text and V the size of the dictionary
(additive smoothing; alpha 1 is Laplace's). As in fairseq-eval-lm, every token of the test text is scored, the
</s> at the end of each line included, over the whole dictionary; the loss is in bits (base 2) per token, and
the perplexity is 2 to its power.

    fairseq-deq-unigram quickstart/bin
    fairseq-deq-unigram data-bin/wikitext-2 --gen-subset valid --json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from fairseq.data import Dictionary, data_utils

from ..errors import OptionError
from .command import command_line, describe, progress

PROGRAM = "fairseq-deq-unigram"


def count_tokens(data: Path, subset: str, dictionary: Any) -> list[int]:
    """Count the tokens of a text that fairseq-preprocess wrote.

    Args:
        data: the folder that fairseq-preprocess wrote.
        subset: which text of it ("train", "valid", "test").
        dictionary: the fairseq dictionary of that folder.

    Returns:
        How often each token of the dictionary occurs, by its index.

    Raises:
        OptionError: the text is missing, empty, or was written with another dictionary.
    """
    dataset = data_utils.load_indexed_dataset(str(data / subset), dictionary)
    if dataset is None:
        raise OptionError(f"There is no {data / subset}.idx; give a folder that fairseq-preprocess wrote.")
    counts = numpy.zeros(len(dictionary), dtype=numpy.int64)
    for index in progress(range(len(dataset)), f"{subset} text"):
        line = numpy.bincount(dataset[index].numpy(), minlength=len(counts))
        if len(line) > len(counts):
            raise OptionError(
                f"{data / subset} has tokens that its dictionary of {len(counts)} does not have."
            )
        counts += line
    if not counts.any():
        raise OptionError(f"The {subset} text in {data} is empty.")
    found: list[int] = counts.tolist()
    return found


def unigram_loss(train: Sequence[int], test: Sequence[int], alpha: float = 1.0) -> float:
    """Compute the loss of the unigram model of one text on another.

    Args:
        train: how often each token occurs in the training text.
        test: how often each token occurs in the test text.
        alpha: what the smoothing adds to each count of the training text.

    Returns:
        The mean of -log2 p over the test tokens; infinite if alpha is 0 and a test token is not in the
        training text.
    """
    mass = sum(train) + alpha * len(train)
    bits = 0.0
    for seen, wanted in zip(train, test, strict=True):
        if wanted:
            probability = (seen + alpha) / mass
            if probability == 0:
                return math.inf
            bits -= wanted * math.log2(probability)
    return bits / sum(test)


def evaluate(data: Path, train_subset: str, gen_subset: str, alpha: float) -> dict[str, Any]:
    """Evaluate the unigram model of a folder that fairseq-preprocess wrote.

    Args:
        data: the folder.
        train_subset: the text to count.
        gen_subset: the text to score.
        alpha: what the smoothing adds to each count.

    Returns:
        `loss` (base 2), `perplexity`, the number of `tokens` scored, and how many of them are </s> (`eos`)
        and <unk> (`unk`).

    Raises:
        OptionError: something is missing.
    """
    if not (data / "dict.txt").is_file():
        raise OptionError(f"There is no {data / 'dict.txt'}; give a folder that fairseq-preprocess wrote.")
    dictionary = Dictionary.load(str(data / "dict.txt"))
    train = count_tokens(data, train_subset, dictionary)
    test = count_tokens(data, gen_subset, dictionary)
    loss = unigram_loss(train, test, alpha)
    return {
        "loss": loss,
        "perplexity": 2**loss,
        "tokens": sum(test),
        "eos": test[dictionary.eos()],
        "unk": test[dictionary.unk()],
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        OptionError: one is wrong.
    """
    parser = describe(argparse.ArgumentParser(), PROGRAM, __doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder that fairseq-preprocess wrote")
    parser.add_argument("--train-subset", default="train", help="text to count (default: train)")
    parser.add_argument("--gen-subset", default="test", help="text to score (default: test)")
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="number that smoothing adds to each count (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    args = parser.parse_args(argv)
    if not 0 <= args.alpha < math.inf:
        raise OptionError(f"--alpha must be 0 or more, not {args.alpha:g}.")
    return args


def _run(argv: Sequence[str] | None) -> None:
    args = parse(argv)
    result = evaluate(args.data, args.train_subset, args.gen_subset, args.alpha)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"Unigram (add {args.alpha:g}) loss (base 2): {result['loss']:.4f}, "
            f"Perplexity: {result['perplexity']:.2f} over {result['tokens']:,} tokens "
            f"({result['eos']:,} </s>, {result['unk']:,} <unk>)"
        )


main = command_line(PROGRAM, _run)
