"""The pieces of a sentencepiece model, numbered as fairseq's dictionary numbers them.

Part of a model that fairseq_deq exported (MIT licence). It needs sentencepiece.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

FILES = {"model_file": "sentencepiece.model", "words_file": "dict.txt"}
# The symbol for a piece that is not in the dictionary. It is no special token: decoding leaves those out.
UNKNOWN = "<unk>"


class DEQTokenizer(PreTrainedTokenizer):
    """Splits text into the pieces of a sentencepiece model, and numbers them as fairseq's dictionary does.

    Every text begins with `bos_token`, with which texts began in training. A piece that is not in the
    dictionary becomes `<unk>`.

    Args:
        model_file: path of the sentencepiece model.
        words_file: path of the symbols, one per line, in the order of their numbers.
        options: those of every tokenizer of transformers.
    """

    vocab_files_names = FILES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, model_file: str, words_file: str, **options: Any) -> None:
        self.model_file, self.words_file = model_file, words_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
        self.words = Path(words_file).read_text(encoding="utf-8").split("\n")[:-1]
        self.numbers = {word: i for i, word in enumerate(self.words)}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """Number of symbols in the dictionary."""
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        """Each symbol with its number."""
        return dict(self.numbers)

    def _tokenize(self, text: str, **_unused: Any) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers.get(token, self.numbers[UNKNOWN])

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index] if index < len(self.words) else UNKNOWN

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that the pieces are parts of."""
        return "".join(tokens).replace("\u2581", " ")

    def _decode(self, token_ids: int | list[int], *given: Any, **named: Any) -> str:
        """The text of numbers.

        If they begin with `bos_token`, the space before the first word is dropped. Otherwise it stays,
        because the text may continue another one.
        """
        text: str = super()._decode(token_ids, *given, **named)
        numbers = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        first = next((number for number in numbers if number != self.pad_token_id), None)
        return text.removeprefix(" ") if first == self.bos_token_id else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The numbers of one text, or of two in sequence, after that of `bos_token`."""
        return [int(self.bos_token_id), *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token, and 0 for each piece of text."""
        ids = [*token_ids_0, *(token_ids_1 or [])]
        if already_has_special_tokens:
            return [int(i in self.all_special_ids) for i in ids]
        return [1, *[0] * len(ids)]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros, because there are no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy both files to `save_directory`."""
        saved = []
        for source, name in zip((self.model_file, self.words_file), FILES.values()):
            target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
            if Path(source).resolve() != target.resolve():
                shutil.copyfile(source, target)
            saved.append(str(target))
        return tuple(saved)
