"""Faults of fairseq in reading raw text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def reading_text(_buffered_read: Callable[..., Any]) -> Callable[..., Any]:
    """Read the prompts of fairseq-interactive as this package reads all raw text (`read_lines`)."""
    from ..generation.text import in_buffers, read_lines

    def wrapper(input: str, buffer_size: int) -> Iterator[list[str]]:
        return in_buffers(read_lines(input), buffer_size)

    return wrapper


def with_symbols_unknown(encode_line: Callable[..., Any]) -> Callable[..., Any]:
    """Treat `<s>`, `<pad>` and `</s>` in a text as unknown words, and not as the dictionary's symbols."""
    from fairseq.tokenizer import tokenize_line

    from ..generation.text import own_symbols

    def wrapper(
        self: Any, line: Any, line_tokenizer: Callable[..., Any] = tokenize_line, *args: Any, **kwargs: Any
    ) -> Any:
        names, unk = {self[i] for i in own_symbols(self)}, self[self.unk()]

        def words(text: Any) -> list[Any]:
            return [unk if word in names else word for word in line_tokenizer(text)]

        return encode_line(self, line, words, *args, **kwargs)

    return wrapper
