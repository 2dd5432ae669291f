"""What fairseq does with raw text, and what it does not say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ._patch import replace


def read_prompts_as_text() -> None:
    """Give fairseq-interactive the one way in for raw text.

    The faults: words that the dictionary does not have silently become <unk>, and the continuation follows
    from those; a byte order mark makes the first word one of them; and a line that is not UTF-8 ends in a
    UnicodeDecodeError that names no line, with those before it in the buffer unanswered.
    """
    import fairseq_cli.interactive as tool
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(tool, "buffered_read", _reading_text)
    replace(FairseqTask, "get_interactive_tokens_and_lengths", _encoding_text)


def _reading_text(_buffered_read: Callable[..., Any]) -> Callable[..., Any]:
    from ..generation.text import in_buffers, read_lines

    def wrapper(input: str, buffer_size: int) -> Iterator[list[str]]:
        return in_buffers(read_lines(input), buffer_size)

    return wrapper


def _encoding_text(_encode: Callable[..., Any]) -> Callable[..., Any]:
    from ..generation.text import TextEncoder

    def wrapper(self: Any, lines: list[str], encode_fn: Callable[[str], str]) -> Any:
        encoder = TextEncoder(self.source_dictionary, encode_fn)
        encoded = [encoder(line) for line in lines]
        for line in encoded:
            line.warn_of_unknown()
        tokens = [line.tokens for line in encoded]
        return tokens, [row.numel() for row in tokens]

    return wrapper


def read_names_of_symbols_as_words() -> None:
    """Take the names of a dictionary's own symbols for unknown words where a text has them.

    The fault: `<pad>` in a text becomes the padding symbol, which fairseq-eval-lm, fairseq-validate and the
    generator each count in another way, so that none of their numbers is right; `<s>` and `</s>` likewise
    become the marks of a beginning and an end that are not there.
    """
    from fairseq.data import Dictionary

    replace(Dictionary, "encode_line", _with_symbols_unknown)


def _with_symbols_unknown(encode_line: Callable[..., Any]) -> Callable[..., Any]:
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


def take_prompts_whole() -> None:
    """Give a model whose decoder can solve for a whole prompt at once (`prefill`) a generator that lets it.

    The fault: the generator hands the tokens of a prompt to the decoder one by one, so that an equilibrium
    model runs its solver once for each.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(FairseqTask, "build_generator", _prefilling)


def _prefilling(build_generator: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(
        self: Any, models: Any, args: Any, seq_gen_cls: Any = None, *rest: Any, **options: Any
    ) -> Any:
        from ..generation.generator import PrefillingGenerator, is_prefillable

        if seq_gen_cls is None and is_prefillable(models) and not getattr(args, "print_alignment", False):
            seq_gen_cls = PrefillingGenerator
        return build_generator(self, models, args, seq_gen_cls, *rest, **options)

    return wrapper
