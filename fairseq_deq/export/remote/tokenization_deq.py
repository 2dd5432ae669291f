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
# What a piece is that the dictionary does not have. It is no special token: those are left out of a text.
UNKNOWN = "<unk>"


class DEQTokenizer(PreTrainedTokenizer):
    """Text to numbers and back.

    Every text begins with `bos_token`, which is what texts began with in training. A piece that the
    dictionary does not have is `<unk>`.

    Args:
        model_file: the sentencepiece model.
        words_file: one symbol a line, in the order of their numbers.
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
        """Symbols of the dictionary."""
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
        """The text of pieces."""
        return "".join(tokens).replace("\u2581", " ")

    def _decode(self, token_ids: int | list[int], *given: Any, **named: Any) -> str:
        """The text of numbers. Where these begin with `bos_token` the space before the first word is left
        out; otherwise they may go on from a text, and it stays."""
        text: str = super()._decode(token_ids, *given, **named)
        numbers = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        first = next((number for number in numbers if number != self.pad_token_id), None)
        return text.removeprefix(" ") if first == self.bos_token_id else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The numbers of a text, or of two one after the other, behind that of its beginning."""
        return [int(self.bos_token_id), *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each number that stands for no piece of text."""
        ids = [*token_ids_0, *(token_ids_1 or [])]
        if already_has_special_tokens:
            return [int(i in self.all_special_ids) for i in ids]
        return [1, *[0] * len(ids)]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros: there are no types."""
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
