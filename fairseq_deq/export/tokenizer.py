"""The files of a tokenizer, from fairseq's dictionary and, where there is one, a sentencepiece model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import OptionError

# How fairseq's dictionary begins, and what stands behind a word that may stand there twice.
SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(4)
_OVERWRITE = "#fairseq:overwrite"
# How sentencepiece marks the beginning of a word.
_MARK = "\u2581"


def find_dictionary(data: str | None, of_training: str, checkpoint: str) -> Path:
    """The dict.txt of a model.

    Args:
        data: the folder that the user names; None: none.
        of_training: the one that the checkpoint names; empty: none.
        checkpoint: its path: what lies beside it is looked at last.
    Raises:
        OptionError: there is none.
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
        types: words of the model.
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
    """Write what `AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` reads.

    Args:
        folder: where to.
        words: the symbols of the dictionary, in the order of their numbers.
        pieces: path of the sentencepiece model; None: the text was cut at spaces.
        begins_with_bos: whether texts begin with `<s>`, and not with `</s>`.
    Raises:
        OptionError: the dictionary is of pieces and there is no model, or the other way round.
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
    # `<unk>` is a word like any other: what is special is left out of a text that was generated.
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
    """What the library `tokenizers` reads: words between spaces, behind the beginning of a text."""
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
    """Write `value` so that people can read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
