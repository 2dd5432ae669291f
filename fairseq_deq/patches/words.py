"""Perplexity per word, for a text whose words were split into pieces."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_BEGINNING = "\u2581"  # sentencepiece puts it before a piece that begins a word
_CONTINUED = "@@"  # subword-nmt puts it after a piece that the next one continues


def _counting_words(eval_lm: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Log the perplexity per word beside that per piece, and return it if `--post-process` asks for words.

    fairseq-eval-lm prints a perplexity per piece, which depends on how the text was split. It counts words
    for subword-nmt only, and not correctly:
    - `--post-process sentencepiece` ends in a NotImplementedError.
    - `--post-process subword_nmt` looks for pieces that end in "subword_nmt", and so changes nothing.
    - With `--post-process "@@ "` a word that two blocks share counts twice, so that the number depends on the
      length of blocks and on the batch size.

    Here the score of the whole text is divided by its number of words. The end of a line counts as one, as it
    does in a text of words.
    """
    signature = inspect.signature(eval_lm)

    def wrapper(*args: Any, **kwargs: Any) -> dict[str, float]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        dictionary = options["target_dictionary"] or options["source_dictionary"]
        scheme = _scheme(dictionary)
        asked = options["post_process"]
        if scheme is None or options["remove_bos_token"] or asked not in (None, *_NAMES[scheme]):
            return eval_lm(*call.args, **call.kwargs)
        if asked is not None:
            options["post_process"] = None if scheme == _BEGINNING else "@@ "
        merges = options["post_process"] is not None
        marks = _word_marks(dictionary, scheme)
        counted = _Counted(options["batch_iterator"], marks, dictionary.pad(), merges)
        options["batch_iterator"] = counted
        results = eval_lm(*call.args, **call.kwargs)
        if counted.words == 0:
            return results
        bits = results["loss"] * counted.divisor / counted.words
        perplexity = 2**bits if bits < 1000 else math.inf
        logger.info(
            f"{counted.words:,} words in {counted.pieces:,} pieces ({_NAMES[scheme][0]}): "
            f"loss per word {bits:.4f}, word-level perplexity {perplexity:.2f}"
        )
        return results if asked is None else {"loss": bits, "perplexity": perplexity}

    return wrapper


_NAMES = {_BEGINNING: ("sentencepiece",), _CONTINUED: ("subword_nmt", "@@ ")}


def _scheme(dictionary: Any) -> str | None:
    """The mark of a dictionary's pieces, which says how words were split; None: they were not."""
    symbols = [dictionary[i] for i in range(dictionary.nspecial, len(dictionary))]
    if any(symbol.startswith(_BEGINNING) for symbol in symbols):
        return _BEGINNING
    if any(symbol.endswith(_CONTINUED) and symbol != _CONTINUED for symbol in symbols):
        return _CONTINUED
    return None


def _word_marks(dictionary: Any, scheme: str) -> Tensor:
    """For each type, whether it counts as a word: it begins one, or it ends one, (V,) bool."""
    symbols = [dictionary[i] for i in range(len(dictionary))]
    if scheme == _BEGINNING:
        marks = torch.tensor([symbol.startswith(_BEGINNING) for symbol in symbols])
    else:
        marks = torch.tensor([not symbol.endswith(_CONTINUED) for symbol in symbols])
    marks[dictionary.eos()] = True
    marks[dictionary.pad()] = False
    return marks


class _Counted:
    """Batches whose words and pieces are counted while they are read.

    Args:
        batches: fairseq's batches.
        marks: the types that count as a word, (V,) bool.
        pad: the padding type, which is not counted.
        merges: whether fairseq's own count leaves out the pieces that the next one continues.
    Attributes:
        pieces, words: numbers of them in the batches so far.
        divisor: the number by which fairseq divides the score.
    """

    def __init__(self, batches: Iterable[Any], marks: Tensor, pad: int, merges: bool) -> None:
        self.batches, self.marks, self.pad, self.merges = batches, marks, pad, merges
        self.pieces = self.words = self.divisor = 0

    def __iter__(self) -> Iterator[Any]:
        for sample in self.batches:
            if "net_input" in sample:
                self._count(sample["target"].cpu())
            yield sample

    def _count(self, target: Tensor) -> None:
        for row in target:
            pieces = row[row != self.pad]
            words = self.marks[pieces]
            self.pieces += pieces.numel()
            self.words += int(words.sum())
            self.divisor += pieces.numel()
            if self.merges:  # fairseq merges a piece with the next one of the same block
                self.divisor -= int((~words[:-1]).sum())
