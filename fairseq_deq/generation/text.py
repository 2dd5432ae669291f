"""The one way in for raw text: read, decode and split it, count unknown words, and bound its length."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.tokenizer import tokenize_line
from torch import Tensor

from ..errors import OptionError

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
# A longer text is solved in parts of this many tokens, each of which sees all tokens before it. So the memory
# of a solve grows linearly with the length of the text, and not with its square.
_PART = 1024
# Largest number of tokens for a model in pretraining. It is a stack of layers, keeps the keys and values of
# each layer, and evaluates a whole text at once.
_LONGEST_FOR_A_STACK = 8192


@dataclass(frozen=True)
class Line:
    """A line of text, split into tokens.

    Attributes:
        text: as it was given.
        pieces: the pieces it was split into, as text; the last is `</s>` if the end counts.
        tokens: their numbers in the dictionary, (n,).
        is_unknown: for each piece, whether it is not in the dictionary.
    """

    text: str
    pieces: list[str]
    tokens: Tensor
    is_unknown: list[bool]

    @property
    def unknown(self) -> list[str]:
        """The pieces that are not in the dictionary."""
        return [piece for piece, unknown in zip(self.pieces, self.is_unknown) if unknown]

    def warn_of_unknown(self, has_end: bool = True) -> None:
        """Log how many words are not in the dictionary, if any.

        Args:
            has_end: whether the last piece is the end of the line.
        """
        if any(self.is_unknown):
            words = len(self.pieces) - has_end
            logger.warning(
                "%d of %d words are not in the dictionary: %s", len(self.unknown), words, self.text.strip()
            )


class TextEncoder:
    """Splits lines of text into tokens.

    The names of the dictionary's own symbols (`<pad>`, `<s>`, `</s>`) have no special meaning in a text: they
    are unknown words.

    Args:
        dictionary: fairseq's.
        encode: applies the tokeniser and the BPE to a line; None: there are none.
    """

    def __init__(self, dictionary: Any, encode: Callable[[str], str] | None = None) -> None:
        self.dictionary, self.encode = dictionary, encode

    @classmethod
    def of(cls, dictionary: Any, tokenizer: Any, bpe: Any) -> TextEncoder:
        """An encoder with fairseq's tokeniser and BPE; either may be None."""
        steps = [step.encode for step in (tokenizer, bpe) if step is not None]

        def encode(text: str) -> str:
            for step in steps:
                text = step(text)
            return text

        return cls(dictionary, encode)

    def __call__(self, text: str, end: bool = True) -> Line:
        """Split a line.

        Args:
            text: the line.
            end: whether `</s>` follows its last word.
        Raises:
            OptionError: it is no text.
        """
        if not isinstance(text, str):
            raise OptionError(f"a sentence must be a text, got {type(text).__name__} {text!r}")
        encoded = text if self.encode is None else self.encode(text)
        pieces = tokenize_line(encoded)
        unk, unk_word = self.dictionary.unk(), self.dictionary[self.dictionary.unk()]
        numbers = [number_of(self.dictionary, piece) for piece in pieces]
        unknown = [n == unk and piece != unk_word for piece, n in zip(pieces, numbers)]
        if end:
            eos = self.dictionary.eos()
            pieces, numbers, unknown = [*pieces, self.dictionary[eos]], [*numbers, eos], [*unknown, False]
        return Line(text, pieces, torch.tensor(numbers, dtype=torch.long), unknown)


def number_of(dictionary: Any, word: str) -> int:
    """A word's number in the dictionary; the names of the dictionary's own symbols are unknown words."""
    number = dictionary.index(word)
    return dictionary.unk() if number in own_symbols(dictionary) else number


def own_symbols(dictionary: Any) -> tuple[int, int, int]:
    """The numbers of the dictionary's own symbols, which no word of a text has: beginning, padding, end."""
    return dictionary.bos(), dictionary.pad(), dictionary.eos()


def read_lines(name: str) -> Iterator[str]:
    """The lines of a UTF-8 text, without space around them and without a byte order mark.

    Args:
        name: path of the file; `-` is standard input.
    Raises:
        OptionError: there is no such file, or a line is not text; the lines before it have been yielded by
            then.
    """
    if name != "-" and (os.path.isdir(name) or not os.path.exists(name)):
        raise OptionError(f"--input: there is no text {name}")
    shown = "standard input" if name == "-" else name
    given = contextlib.nullcontext(getattr(sys.stdin, "buffer", sys.stdin))
    with given if name == "-" else open(name, "rb") as lines:
        for number, line in enumerate(lines, 1):
            yield _decoded(line, number, shown).strip()


def _decoded(line: bytes | str, number: int, name: str) -> str:
    if isinstance(line, str):  # a stream of text, which has no bytes to decode
        line = line.encode("utf-8", "surrogateescape")
    if number == 1:
        line = line.removeprefix(_BOM)
    advice = "the lines before it were answered; convert the text with iconv -t utf-8"
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OptionError(
            f"--input: line {number} of {name} is not text in UTF-8 but binary or UTF-16; {advice}"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise OptionError(
            f"--input: line {number} of {name} is not UTF-8 (byte 0x{byte:02x} at place {error.start + 1}, "
            f"perhaps Latin-1); {advice}"
        ) from None


def in_buffers(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lines in lists of at most `size`; if a line cannot be read, the lines before it come before the error.

    Args:
        lines: as from `read_lines`.
        size: largest number of lines in a list, at least 1.
    Raises:
        OptionError: that of `lines`.
    """
    buffer: list[str] = []
    failure: OptionError | None = None
    try:
        for line in lines:
            buffer.append(line)
            if len(buffer) >= size:
                yield buffer
                buffer = []
    except OptionError as error:
        failure = error
    if buffer:
        yield buffer
    if failure is not None:
        raise failure


def bound_lengths(models: Sequence[Any]) -> int:
    """Let models solve long texts in parts that see all earlier ones, and find how long a text may be.

    Args:
        models: language models. Decoders of this package are set to solve in parts, unless they already do.
    Returns:
        the largest number of tokens that all models can read.
    """
    longest = sys.maxsize
    for model in models:
        decoder = model.decoder
        limit = model.max_positions()
        longest = min(longest, int(limit if isinstance(limit, (int, float)) else min(limit)))
        if getattr(decoder, "pretraining", False):
            longest = min(longest, _LONGEST_FOR_A_STACK)
        elif getattr(decoder, "subseq_len", None) == 0:
            decoder.subseq_len = _PART
    return longest


def check_length(line: Line, longest: int) -> None:
    """Refuse a line that is longer than the models can read.

    Args:
        line: the line.
        longest: what `bound_lengths` returned.
    Raises:
        OptionError: the line has more tokens.
    """
    if line.tokens.numel() > longest:
        raise OptionError(
            f"a line has {line.tokens.numel()} tokens, and the model reads at most {longest}: cut it "
            f"({line.text[:60]!r}...)"
        )
