"""The files of a data folder belong together, or one sentence says which does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from fairseq.data import Dictionary, indexed_dataset
from selection import few_of

from fairseq_deq import data_folder
from fairseq_deq.data_folder import FINGERPRINT, check_text, write_fingerprint
from fairseq_deq.errors import OptionError


@pytest.fixture
def folder(data_bin, tmp_path):
    """A copy of the binarised text, which has no fingerprint."""
    copied = shutil.copytree(data_bin, tmp_path / "data-bin")
    (copied / FINGERPRINT).unlink(missing_ok=True)
    return copied


@pytest.fixture
def marked(folder):
    """The same with a fingerprint."""
    write_fingerprint(folder)
    return folder


def _other_index(folder):
    shutil.copy(folder / "valid.idx", folder / "test.idx")


def _short_text(folder):
    whole = (folder / "test.bin").read_bytes()
    (folder / "test.bin").write_bytes(whole[:-3])


def _long_text(folder):
    (folder / "test.bin").write_bytes((folder / "test.bin").read_bytes() + b"\0\0")


def _short_index(folder):
    (folder / "test.idx").write_bytes((folder / "test.idx").read_bytes()[:-5])


def _no_index(folder):
    (folder / "test.idx").unlink()


def _no_text(folder):
    (folder / "test.bin").unlink()


def _page_for_index(folder):
    (folder / "test.idx").write_text("<html>404</html>")


def _pointer_for_index(folder):
    (folder / "test.idx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _number_beyond(folder):
    text = np.fromfile(folder / "test.bin", np.uint16)
    text[7] = 60000
    text.tofile(folder / "test.bin")


def _padding(folder):
    text = np.fromfile(folder / "test.bin", np.uint16)
    text[[3, 9]] = 1
    text.tofile(folder / "test.bin")


def _shorter_dictionary(folder):
    lines = (folder / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join(lines[:300]))


# Of these the files themselves tell.
FAULTS = {
    "index of another text": (_other_index, "is not the index of test.bin"),
    "text cut short": (_short_text, "is not the index of test.bin"),
    "text grown": (_long_text, "is not the index of test.bin"),
    "index cut short": (_short_index, "test.idx is cut short or damaged"),
    "no index": (_no_index, "test.bin has no test.idx beside it"),
    "no text": (_no_text, "test.idx has no test.bin beside it"),
    "page for an index": (_page_for_index, "is not an index that fairseq-preprocess wrote"),
    "pointer for an index": (_pointer_for_index, "is not an index that fairseq-preprocess wrote"),
    "number beyond the dictionary": (_number_beyond, "has the number 60000, and the dictionary 792 types"),
    "padding": (_padding, "has the padding symbol <pad> 2 times"),
    "shorter dictionary": (_shorter_dictionary, "and the dictionary 304 types"),
}


def _swapped_words(folder):
    lines = (folder / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))


def _changed_number(folder):
    text = np.fromfile(folder / "test.bin", np.uint16)
    text[7] ^= 1
    text.tofile(folder / "test.bin")


def _other_lines(folder):
    words = Dictionary.load(str(folder / "dict.txt"))
    text = indexed_dataset.make_dataset(str(folder / "test"), "mmap", dictionary=words)
    builder = indexed_dataset.make_builder(str(folder / "other.bin"), "mmap", len(words))
    for i in (1, 0, *range(2, len(text))):
        builder.add_item(text[i])
    builder.finalize(str(folder / "other.idx"))
    shutil.move(folder / "other.idx", folder / "test.idx")


# Of these only a fingerprint tells.
CHANGES = {
    "words swapped": (_swapped_words, "were binarised with another dictionary"),
    "another number": (_changed_number, "is not what fairseq-preprocess wrote"),
    "lines of other lengths": (_other_lines, "is not what fairseq-preprocess wrote"),
}

TOOLS = {
    "eval-lm": ("fairseq-eval-lm", ("--task", "language_modeling")),
    "eval-lm, streams": ("fairseq-eval-lm", ("--task", "deq_language_modeling")),
    "validate": ("fairseq-validate", ("--task", "language_modeling", "--batch-size", "8")),
    "train": ("fairseq-train", ("--task", "language_modeling")),
    "train, streams": ("fairseq-train", ("--task", "deq_language_modeling")),
}


@pytest.mark.parametrize(("fault", "run"), few_of((fault, run) for fault in FAULTS for run in TOOLS))
def test_faults_are_named_by_every_tool_and_task(
    refused, folder, deq_checkpoint, deq_training, tmp_path, fault, run
):
    make_fault, sentence = FAULTS[fault]
    tool, task = TOOLS[run]
    make_fault(folder)
    common = ("--tokens-per-sample", "32", "--num-workers", "0", "--cpu")
    options = (*task, *common, "--path", deq_checkpoint)
    if tool == "fairseq-validate":
        options = (*options, "--valid-subset", "test")
    if tool == "fairseq-train":
        options = (*deq_training[1:], *task, "--train-subset", "test", "--save-dir", tmp_path / "save")
    if make_fault is _shorter_dictionary and tool != "fairseq-train":
        sentence = "was trained with a dictionary of 792 types"
    assert sentence in refused(tool, folder, *options).text


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_a_fingerprint_tells_what_has_changed(refused, marked, deq_training, tmp_path, change, sentence):
    change(marked)
    training = (*deq_training[1:], "--train-subset", "test", "--save-dir", tmp_path / "save")
    assert sentence in refused("fairseq-train", marked, *training).text


@pytest.mark.parametrize("change", [_swapped_words, _changed_number])
def test_without_a_fingerprint_a_folder_works_as_before(in_process, folder, deq_training, tmp_path, change):
    change(folder)
    in_process(
        *("fairseq-train", folder, *deq_training[1:], "--max-update", "1", "--disable-validation"),
        *("--train-subset", "test", "--save-dir", tmp_path / "save"),
    )


def test_every_bit_of_an_index_that_changes_is_noticed(folder):
    words = Dictionary.load(str(folder / "dict.txt"))
    path = folder / "valid.idx"
    whole = path.read_bytes()
    check_text(str(folder / "valid"), words)
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(OptionError):
                check_text(str(folder / "valid"), words)


def test_a_damaged_fingerprint_is_named(marked):
    (marked / FINGERPRINT).write_text('{"dictionaries": ')
    with pytest.raises(OptionError, match=r"fingerprint\.json is damaged"):
        check_text(str(marked / "test"))


def test_preprocessing_with_the_package_keeps_a_fingerprint(in_process, text, tmp_path):
    arguments = ("--only-source", "--testpref", text / "test.txt", "--trainpref", text / "train.txt")
    in_process("fairseq-preprocess", *arguments, "--destdir", tmp_path / "bin", "--workers", "1")
    kept = json.loads((tmp_path / "bin" / FINGERPRINT).read_text())
    assert kept["dictionaries"]["dict.txt"]["types"] == 792
    assert set(kept["texts"]) == {"train", "test"}
    check_text(str(tmp_path / "bin" / "test"), Dictionary.load(str(tmp_path / "bin" / "dict.txt")))


def test_symbols_that_a_task_adds_do_not_matter(marked):
    words = Dictionary.load(str(marked / "dict.txt"))
    words.add_symbol("<mask>")
    check_text(str(marked / "test"), words)


def test_a_large_text_is_read_once_and_again_when_it_changes(monkeypatch, folder):
    words = Dictionary.load(str(folder / "dict.txt"))
    monkeypatch.setattr(data_folder, "_LARGE", 100)
    passes = []
    whole = data_folder._pass_over
    monkeypatch.setattr(data_folder, "_pass_over", lambda *args: passes.append(args) or whole(*args))  # type: ignore[func-returns-value]
    check_text(str(folder / "test"), words)
    check_text(str(folder / "test"), words)
    assert len(passes) == 1
    _number_beyond(folder)
    with pytest.raises(OptionError, match="has the number 60000"):
        check_text(str(folder / "test"), words)
