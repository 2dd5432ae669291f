"""Whether the files of a data folder belong together: text, index and dictionary."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import OptionError

FINGERPRINT = "fingerprint.json"
_CHECKED = ".checked.json"

_MAGIC = b"MMIDIDX\x00\x00"
_OTHER_MAGICS = (b"TNTIDX\x00\x00", b"HUFFIDX\x00\x00")
_HEADER = len(_MAGIC) + 8 + 1 + 8
_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2", 9: "u4", 10: "u8"}

# A text is read once when it is opened, about a second for a gigabyte. Above this size what was found is kept
# beside it, and holds as long as the file has the same size and time of change.
_LARGE = 1 << 28
_BLOCK = 1 << 24

_AGAIN = "binarise the text again with fairseq-preprocess"


@dataclass(frozen=True)
class Contents:
    """What a pass over the numbers of a text found.

    Attributes:
        bytes: length of the file.
        crc32: its checksum.
        smallest, largest: its numbers.
        padding: how many of them stand for padding.
    """

    bytes: int
    crc32: int
    smallest: int
    largest: int
    padding: int


def words_fingerprint(symbols: list[str]) -> dict[str, Any]:
    """What tells one dictionary from another: number of types, and a hash of them in their order."""
    return {"types": len(symbols), "sha256": hashlib.sha256("\n".join(symbols).encode()).hexdigest()}


def check_text(prefix: str, dictionary: Any = None) -> None:
    """Refuse a binarised text whose files do not belong together.

    The index must fit the text in every number, no number of the text may be beyond the dictionary or stand
    for padding, and where the folder has a fingerprint, all must be what was binarised.

    Args:
        prefix: the path without `.bin` and `.idx`; a text that is not there, or not binarised, is left alone.
        dictionary: fairseq's; None: the numbers are not compared with one.
    Raises:
        OptionError: the sentence names the file, and what is wrong with it.
    """
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    if not index.exists() and not data.exists():
        return
    for one, other in ((index, data), (data, index)):
        if not one.exists():
            raise OptionError(f"{other} has no {one.name} beside it; copy both, or {_AGAIN}")
    kept = _fingerprint(index.parent)
    _check_dictionary(kept, dictionary, index.parent)
    kind = _check_index(index, data)
    if kind is None or data.stat().st_size == 0:
        return
    found = _contents(data, np.dtype(kind), dictionary.pad() if dictionary is not None else None)
    _check_numbers(data, found, dictionary)
    text = kept.get("texts", {}).get(index.stem)
    if text is not None and text != _text_fingerprint(index, found):
        raise OptionError(
            f"{data} or {index.name} is not what fairseq-preprocess wrote: they have changed; {_AGAIN}, or "
            f"remove {index.parent / FINGERPRINT} if that is what you want to use"
        )


def write_fingerprint(folder: str | Path) -> None:
    """Keep what tells the texts and dictionaries of a folder from others, beside them.

    Args:
        folder: what fairseq-preprocess wrote.
    """
    folder = Path(folder)
    dictionaries = {path.name: words_fingerprint(_words(path)) for path in sorted(folder.glob("dict*.txt"))}
    texts = {}
    for index in sorted(folder.glob("*.idx")):
        data = index.with_suffix(".bin")
        kind = _check_index(index, data) if data.exists() else None
        if kind is not None and data.stat().st_size:
            texts[index.stem] = _text_fingerprint(index, _pass_over(data, np.dtype(kind), None))
    if dictionaries:
        _write(folder / FINGERPRINT, {"dictionaries": dictionaries, "texts": texts})


def _check_dictionary(kept: Mapping[str, Any], dictionary: Any, folder: Path) -> None:
    known = kept.get("dictionaries", {}).values()
    if dictionary is None or not known:
        return
    # A task may have added symbols of its own behind those of the file.
    if not any(words_fingerprint(dictionary.symbols[: one["types"]]) == one for one in known):
        types = " or ".join(str(one["types"]) for one in known)
        raise OptionError(
            f"the texts in {folder} were binarised with another dictionary (of {types} types) than the one "
            f"in use (of {len(dictionary)} types, or in another order): put its dict.txt back, or {_AGAIN}"
        )


def _check_index(index: Path, data: Path) -> str | None:
    """The type of the numbers of a text whose index fits it; None where it has an index of another kind."""
    with open(index, "rb") as file:
        header, stored = file.read(_HEADER), os.fstat(file.fileno()).st_size
        if header.startswith(_OTHER_MAGICS):
            return None
        kind = _TYPES.get(header[17]) if len(header) == _HEADER else None
        if not header.startswith(_MAGIC) or int.from_bytes(header[9:17], "little") != 1 or kind is None:
            raise OptionError(f"{index} is not an index that fairseq-preprocess wrote; {_AGAIN}")
        count = int.from_bytes(header[18:], "little")
        if stored != _HEADER + 12 * count:
            raise OptionError(f"{index} is cut short or damaged: it has {stored} bytes; {_AGAIN}")
        sizes = np.fromfile(file, np.int32, count).astype(np.int64)
        pointers = np.fromfile(file, np.int64, count)
    width = np.dtype(kind).itemsize
    ends = np.cumsum(sizes) * width
    if (sizes < 0).any() or not np.array_equal(pointers, ends - sizes * width):
        raise OptionError(f"{index} is damaged: its numbers contradict each other; {_AGAIN}")
    expected, has = int(ends[-1]) if count else 0, data.stat().st_size
    if has != expected:
        raise OptionError(
            f"{index} is not the index of {data.name}: it is for {expected} bytes, and the text has {has}; "
            f"one of them is from elsewhere or cut short: {_AGAIN}"
        )
    return kind


def _check_numbers(data: Path, found: Contents, dictionary: Any) -> None:
    if dictionary is None:
        return
    if found.largest >= len(dictionary) or found.smallest < 0:
        number = found.smallest if found.smallest < 0 else found.largest
        raise OptionError(
            f"{data} has the number {number}, and the dictionary {len(dictionary)} types: it was binarised "
            f"with another dictionary, or is damaged; {_AGAIN}"
        )
    if found.padding:
        raise OptionError(
            f"{data} has the padding symbol {dictionary[dictionary.pad()]} {found.padding} times among its "
            "words, where no score would be right; binarise the text again with fairseq-preprocess "
            "--user-dir fairseq_deq, which takes it for an unknown word"
        )


def _contents(data: Path, kind: np.dtype, pad: int | None) -> Contents:
    """What is in a text: found now, or found before where it is large and has not changed."""
    state = data.stat()
    if state.st_size < _LARGE:
        return _pass_over(data, kind, pad)
    place = data.with_suffix(_CHECKED)
    key = {"bytes": state.st_size, "changed": state.st_mtime_ns, "pad": pad}
    kept = _read(place)
    if kept.get("key") == key:
        return Contents(**kept["contents"])
    found = _pass_over(data, kind, pad)
    with contextlib.suppress(OSError):  # a text in a folder that cannot be written to is read each time
        _write(place, {"key": key, "contents": asdict(found)})
    return found


def _pass_over(data: Path, kind: np.dtype, pad: int | None) -> Contents:
    crc, smallest, largest, padding = 0, 0, 0, 0
    for block in _blocks(data):
        crc = zlib.crc32(block, crc)
        numbers = np.frombuffer(block, kind)
        low, high = int(numbers.min()), int(numbers.max())
        smallest, largest = min(smallest, low), max(largest, high)
        padding += int(np.count_nonzero(numbers == pad)) if pad is not None else 0
    return Contents(data.stat().st_size, crc, smallest, largest, padding)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _text_fingerprint(index: Path, found: Contents) -> dict[str, int]:
    return {"bytes": found.bytes, "crc32": found.crc32, "index_crc32": zlib.crc32(index.read_bytes())}


def _words(path: Path) -> list[str]:
    from fairseq.data import Dictionary

    return Dictionary.load(str(path)).symbols


def _fingerprint(folder: Path) -> Mapping[str, Any]:
    kept = _read(folder / FINGERPRINT)
    if not isinstance(kept.get("dictionaries", {}), dict) or not isinstance(kept.get("texts", {}), dict):
        raise OptionError(f"{folder / FINGERPRINT} is damaged; {_AGAIN}, or remove it")
    return kept


def _read(path: Path) -> Mapping[str, Any]:
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise OptionError(f"{path} is damaged; {_AGAIN}, or remove it") from None
    return kept if isinstance(kept, dict) else {"dictionaries": None}


def _write(path: Path, contents: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    unfinished.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
