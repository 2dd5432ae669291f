"""Prompts of unknown words generate, with a warning."""

import logging
from types import SimpleNamespace

from fairseq.data import Dictionary
from fairseq.tasks.fairseq_task import FairseqTask

import fairseq_deq  # noqa: F401  (installs the remedies)


def test_unknown_words_of_a_prompt_are_counted(caplog):
    words = Dictionary()
    words.add_symbol("known")
    task = SimpleNamespace(source_dictionary=words)
    with caplog.at_level(logging.WARNING):
        tokens, _ = FairseqTask.get_interactive_tokens_and_lengths(
            task, ["known strange words", "known"], lambda line: line
        )
    assert tokens[0].tolist() == [4, words.unk(), words.unk(), words.eos()]
    assert [record.message for record in caplog.records] == [
        "2 of 3 words are not in the dictionary: known strange words"
    ]
