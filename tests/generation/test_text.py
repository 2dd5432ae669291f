"""Raw text is read, decoded and cut in one way."""

from __future__ import annotations

import io
import sys

import pytest
from models.builders import dictionary

import fairseq_deq  # noqa: F401  (installs the patches)
from fairseq_deq.errors import OptionError
from fairseq_deq.generation.text import TextEncoder, in_buffers, read_lines

GOOD = b"word1 word2\nword3\n"

BAD_LINES = {
    "Latin-1": (b"caf\xe9\n", r"line 3 of .* is not UTF-8 \(byte 0xe9 at place 4"),
    "binary": (b"a\x00b\n", r"line 3 of .* is not text in UTF-8 but binary or UTF-16"),
    "cut character": ("caf\u00e9".encode()[:-1], r"line 3 of .* is not UTF-8 \(byte 0xc3 at place 4"),
}


def given(tmp_path, monkeypatch, content, source):
    """The name of an input with this content."""
    if source == "file":
        (tmp_path / "text.txt").write_bytes(content)
        return str(tmp_path / "text.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    return "-"


@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.parametrize(("line", "sentence"), BAD_LINES.values(), ids=BAD_LINES)
def test_lines_before_one_that_is_no_text_are_given(tmp_path, monkeypatch, line, sentence, source):
    name = given(tmp_path, monkeypatch, GOOD + line + b"after\n", source)
    buffers = in_buffers(read_lines(name), 100)
    assert next(buffers) == ["word1 word2", "word3"]
    with pytest.raises(OptionError, match=sentence):
        next(buffers)


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_byte_order_mark_is_dropped(tmp_path, monkeypatch, source):
    name = given(tmp_path, monkeypatch, b"\xef\xbb\xbf" + GOOD, source)
    assert list(read_lines(name)) == ["word1 word2", "word3"]


def test_utf_16_is_named(tmp_path, monkeypatch):
    name = given(tmp_path, monkeypatch, "word1\n".encode("utf-16"), "file")
    with pytest.raises(OptionError, match="binary or UTF-16"):
        list(read_lines(name))


def test_ends_of_lines_and_empty_lines(tmp_path, monkeypatch):
    name = given(tmp_path, monkeypatch, b"a\r\n\n  b \nc", "file")
    assert list(read_lines(name)) == ["a", "", "b", "c"]
    assert list(in_buffers(read_lines(name), 3)) == [["a", "", "b"], ["c"]]


def test_a_stream_of_text_without_bytes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word1\nword2\n"))
    assert list(read_lines("-")) == ["word1", "word2"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match="--input: there is no text"):
        list(read_lines(str(tmp_path / "none.txt")))


@pytest.mark.parametrize("name", ["<pad>", "<s>", "</s>"])
def test_names_of_symbols_are_unknown_words_on_every_way_in(name):
    words = dictionary()
    line = TextEncoder(words)(f"word1 {name} word2")
    assert line.tokens.tolist() == [5, words.unk(), 6, words.eos()]
    assert line.unknown == [name]
    encoded = words.encode_line(f"word1 {name} word2", add_if_not_exist=False)
    assert encoded.tolist() == line.tokens.tolist()


def test_what_the_text_calls_unknown_is_known():
    line = TextEncoder(dictionary())("word1 <unk> other", end=False)
    assert line.unknown == ["other"]
    assert line.pieces == ["word1", "<unk>", "other"]
