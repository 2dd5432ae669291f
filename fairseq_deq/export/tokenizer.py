"""Writes a tokenizer, made from fairseq's dictionary and, if there is one, a sentencepiece model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import OptionError

# The symbols with which fairseq's dictionary begins, and the mark of a word that may occur in it twice.
SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(4)
_OVERWRITE = "#fairseq:overwrite"
# The character with which sentencepiece marks the beginning of a word.
_MARK = "\u2581"


def find_dictionary(data: str | None, of_training: str, checkpoint: str) -> Path:
    """The path of a model's dict.txt.

    Args:
        data: the folder that the user names; None: none. Only this folder is searched if there is one.
        of_training: the data folder that the checkpoint names; empty: it names none.
        checkpoint: path of the checkpoint, whose folder is searched last.
    Raises:
        OptionError: there is no dict.txt.
    """
    folders = [data] if data is not None else [of_training, os.path.dirname(checkpoint) or "."]
    for folder in folders:
        path = Path(folder or ".") / "dict.txt"
        if path.is_file() and folder:
            return path
    named = (
        f"--data {data}" if data is not None else f"the data folder of the training, {of_training or 'none'},"
    )
    raise OptionError(f"{named} has no dict.txt; name the folder that fairseq-preprocess wrote with --data")


def read_dictionary(path: Path, types: int) -> list[str]:
    """The symbols of a dictionary in the order of their numbers.

    Args:
        path: the dict.txt.
        types: number of symbols that the model has.
    Raises:
        OptionError: it is no dictionary, or that of another model.
    """
    words, known = list(SYMBOLS), set(SYMBOLS)
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                word, count = line.rstrip().rsplit(" ", 1)
                may_repeat = count == _OVERWRITE
                if may_repeat:
                    word, count = word.rsplit(" ", 1)
                int(count)
                if word in known and not may_repeat:
                    raise OptionError(
                        f"{path} has {word!r} twice; take the one that fairseq-preprocess wrote"
                    )
                words.append(word)
                known.add(word)
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            f"{path} is not a dictionary of fairseq: each line must be a word and a number"
        ) from None
    if len(words) != types:
        raise OptionError(
            f"{path} has {len(words)} types with fairseq's own, and the model {types}: name the data folder "
            "that it was trained on with --data"
        )
    return words


def write_tokenizer(folder: Path, words: list[str], pieces: str | None, begins_with_bos: bool) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` reads.

    Args:
        folder: where to write.
        words: the symbols of the dictionary, in the order of their numbers.
        pieces: path of the sentencepiece model; None: the text was split at spaces.
        begins_with_bos: whether texts begin with `<s>`; otherwise they begin with `</s>`.
    Raises:
        OptionError: the dictionary is of pieces and there is no sentencepiece model, or the other way round.
    """
    marked = sum(word.startswith(_MARK) for word in words)
    if pieces is None and marked:
        raise OptionError(
            f"{marked} words of the dictionary are pieces of sentencepiece; name its model with "
            "--sentencepiece-model"
        )
    if pieces is not None and not os.path.isfile(pieces):
        raise OptionError(f"--sentencepiece-model: there is no file {pieces}")
    if pieces is not None and not marked:
        raise OptionError(
            "--sentencepiece-model: no word of the dictionary is a piece of sentencepiece; leave it out"
        )
    first = BOS if begins_with_bos else EOS
    # `<unk>` is not among the special tokens: those are left out of generated texts.
    settings: dict[str, Any] = {
        "bos_token": SYMBOLS[first],
        "eos_token": SYMBOLS[EOS],
        "pad_token": SYMBOLS[PAD],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if pieces is None:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer.json", _whole_words(words, first))
    else:
        settings["tokenizer_class"] = "DEQTokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_deq.DEQTokenizer", None]}
        shutil.copyfile(pieces, folder / "sentencepiece.model")
        (folder / "dict.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


def _whole_words(words: list[str], first: int) -> dict[str, Any]:
    """The content of tokenizer.json for the library `tokenizers`, for words that spaces separate.

    Args:
        words: the symbols of the dictionary, in the order of their numbers.
        first: the symbol with which every text begins.
    """
    begin = SYMBOLS[first]
    special = {"special": True, "single_word": True, "lstrip": False, "rstrip": False, "normalized": False}
    sequence = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    beginning = [{"SpecialToken": {"id": begin, "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": SYMBOLS[i], **special} for i in (BOS, PAD, EOS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": beginning + sequence[:1],
            "pair": beginning + sequence,
            "special_tokens": {begin: {"id": begin, "ids": [first], "tokens": [begin]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": SYMBOLS[UNK],
        },
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
