"""Prompts of unknown words generate, with a warning; prompts are handed over whole."""

import logging
from types import SimpleNamespace

from fairseq.data import Dictionary
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel
from fairseq.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer
from models.builders import build, dictionary

from fairseq_deq.generation.generator import PrefillingGenerator
from fairseq_deq.tasks._careful import CarefulTask
from fairseq_deq.tasks.language_modeling import CarefulLanguageModelingTask


def test_unknown_words_of_a_prompt_are_counted(caplog):
    words = Dictionary()
    words.add_symbol("known")
    reader = SimpleNamespace(source_dictionary=words)
    with caplog.at_level(logging.WARNING):
        tokens, _ = CarefulTask.get_interactive_tokens_and_lengths(
            reader, ["known strange words", "known"], lambda line: line
        )
    assert tokens[0].tolist() == [4, words.unk(), words.unk(), words.eos()]
    assert [record.message for record in caplog.records] == [
        "2 of 3 words are not in the dictionary: known strange words"
    ]


class _StockDecoder(FairseqIncrementalDecoder):
    """A decoder without `prefill`."""

    def max_positions(self):
        return 10


def test_a_model_that_takes_whole_prompts_gets_a_generator_that_hands_them_over():
    arguments = SimpleNamespace(beam=2)
    careful = CarefulLanguageModelingTask(SimpleNamespace(), dictionary())
    built = careful.build_generator([build()], arguments)
    assert type(built) is PrefillingGenerator
    assert built.beam_size == 2
    stock = FairseqLanguageModel(_StockDecoder(dictionary()))
    assert type(careful.build_generator([stock], arguments)) is SequenceGenerator
    scoring = SimpleNamespace(score_reference=True)
    assert type(careful.build_generator([build()], scoring)) is SequenceScorer
