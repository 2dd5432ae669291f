"""The dictionary as fairseq reads it, and the tokenizer that is made of it."""

import json

import pytest
from fairseq.data import Dictionary

from fairseq_deq.errors import OptionError
from fairseq_deq.export.tokenizer import find_dictionary, read_dictionary, write_tokenizer

LINES = (
    "the 12\n",
    "na\u00efve 3\n",
    "#fairseq:overwrite 2\n",  # a word
    "<unk> 4 #fairseq:overwrite\n",
    "a\u2028b 1\n",
    "42 1\n",
    "madeupword0000 0\n",
)


def test_a_dictionary_is_what_fairseq_reads(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    theirs = Dictionary.load(str(path))
    assert read_dictionary(path, len(theirs)) == theirs.symbols


@pytest.mark.parametrize("lines", [["the 1\n", "the 2\n"], ["the\n"], ["the many\n"], ["<unk> 3\n"]])
def test_what_fairseq_refuses_is_refused(tmp_path, lines):
    path = tmp_path / "dict.txt"
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises((RuntimeError, ValueError)):
        Dictionary.load(str(path))
    with pytest.raises(OptionError, match=r"dict\.txt"):
        read_dictionary(path, 5)


def test_where_a_dictionary_is_looked_for(tmp_path):
    for name in ("named", "training", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dict.txt").touch()
    named, training, checkpoint = (str(tmp_path / name) for name in ("named", "training", "checkpoints/a.pt"))
    assert find_dictionary(named, training, checkpoint).parent.name == "named"
    assert find_dictionary(None, training, checkpoint).parent.name == "training"
    assert find_dictionary(None, "", checkpoint).parent.name == "checkpoints"
    assert find_dictionary(None, "/nowhere", checkpoint).parent.name == "checkpoints"
    (tmp_path / "named" / "dict.txt").unlink()
    with pytest.raises(OptionError, match=r"--data .*named has no dict\.txt"):
        find_dictionary(named, training, checkpoint)


@pytest.mark.parametrize(("begins_with_bos", "begin"), [(False, "</s>"), (True, "<s>")])
def test_texts_begin_as_in_training(tmp_path, begins_with_bos, begin):
    words = ["<s>", "<pad>", "</s>", "<unk>", "the"]
    write_tokenizer(tmp_path, words, None, begins_with_bos)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["padding_side"]) == (begin, "</s>", "left")
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == {word: i for i, word in enumerate(words)}
    assert made["post_processor"]["single"][0]["SpecialToken"]["id"] == begin
    # What is special is left out of a text that was generated: an unknown word is not to be.
    assert "<unk>" not in {token["content"] for token in made["added_tokens"]}


def test_pieces_and_their_model_come_together(tmp_path):
    words = ["<s>", "<pad>", "</s>", "<unk>", "the", "\u2581the"]
    with pytest.raises(OptionError, match="name its model with --sentencepiece-model"):
        write_tokenizer(tmp_path, words, None, False)
    with pytest.raises(OptionError, match="--sentencepiece-model: there is no file"):
        write_tokenizer(tmp_path, words, str(tmp_path / "none"), False)
    (tmp_path / "model").touch()
    with pytest.raises(OptionError, match="no word of the dictionary is a piece"):
        write_tokenizer(tmp_path, words[:-1], str(tmp_path / "model"), False)
