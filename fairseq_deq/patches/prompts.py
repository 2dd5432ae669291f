"""What fairseq does with prompts, and what it does not say about them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ._patch import replace

logger = logging.getLogger(__name__)


def warn_of_unknown_words() -> None:
    """Say how many words of a prompt the dictionary does not have.

    The fault: they silently become <unk>, and the continuation follows from those.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(FairseqTask, "get_interactive_tokens_and_lengths", _with_unknown_words_counted)


def _with_unknown_words_counted(encode: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, lines: list[str], encode_fn: Callable[[str], str]) -> Any:
        tokens, lengths = encode(self, lines, encode_fn)
        unk = self.source_dictionary.unk()
        for line, ids in zip(lines, tokens):
            unknown = int((ids == unk).sum())
            if unknown:
                words = ids.numel() - 1  # the last is the end of sentence
                logger.warning("%d of %d words are not in the dictionary: %s", unknown, words, line.strip())
        return tokens, lengths

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
