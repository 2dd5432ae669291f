"""What fairseq-interactive does not say about its prompts."""

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
