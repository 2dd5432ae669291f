"""Text into tokens: pieces of words learnt on the training text, words and punctuation marks, or as it is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

from ...errors import OptionError


def learn_sentencepiece(paragraphs: Sequence[str], vocab_size: int) -> bytes:
    """Learn byte-pair pieces.

    Args:
        paragraphs: the training text.
        vocab_size: number of pieces.

    Returns:
        The model, the same bytes for the same text.

    Raises:
        OptionError: the text has too few different character sequences, or too many different characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        # From an iterator into a buffer, so that no file name gets into the model.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(paragraphs),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        # sentencepiece says the bound in one of two ways, inside a longer message.
        most = re.search(r"<= (\d+)\.", str(error))
        least = re.search(r" vs (\d+)\.", str(error))
        bound = f": at most {most[1]}" if most else f": at least {least[1]}" if least else f" ({error})"
        raise OptionError(f"--vocab-size {vocab_size} does not suit this text{bound}.") from None
    return model.getvalue()


def make_tokenizer(name: str, model: bytes | None) -> Callable[[list[str]], list[str]]:
    """Make the function that tokenises paragraphs.

    Args:
        name: "sentencepiece", "moses" or "none".
        model: the sentencepiece model, if that is the tokeniser.

    Returns:
        A function from paragraphs to paragraphs whose tokens are separated by spaces.
    """
    if name == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return lambda paragraphs: [" ".join(pieces) for pieces in processor.encode(paragraphs, out_type=str)]
    if name == "moses":
        import sacremoses

        moses = sacremoses.MosesTokenizer("en")
        # The settings of fairseq-interactive --tokenizer moses --moses-no-escape.
        return lambda paragraphs: [
            moses.tokenize(paragraph, aggressive_dash_splits=True, return_str=True, escape=False)
            for paragraph in paragraphs
        ]
    return lambda paragraphs: paragraphs
