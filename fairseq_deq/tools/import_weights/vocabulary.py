"""The reference's words in the order of their numbers, and where fairseq's dictionary has them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...errors import OptionError

EOS, UNK = "<eos>", "<unk>"
# fairseq's own symbols come first in each of its dictionaries, in this order.
SYMBOLS = ("<s>", "<pad>", "</s>", UNK)
_TAKEN = ("<s>", "<pad>", "</s>")  # what no word of a text may be called there


@dataclass(frozen=True)
class Vocabulary:
    """Words by number.

    Attributes:
        words: in the order of their numbers in the reference.
        counts: how often each occurs; 1 where it is not known.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]


def read_words(path: Path, types: int) -> Vocabulary:
    """Read a file with one word per line, each with or without its count after a space.

    Args:
        path: of the file; where it lacks `<eos>`, that is put first, as the reference does.
        types: number of words that the weights are for.
    Raises:
        OptionError: it is not such a file, or has another number of words.
    """
    words, counts = [], []
    for number, line in enumerate(_lines(path), 1):
        parts = line.split()
        if len(parts) > 2 or (len(parts) == 2 and not parts[1].isdigit()):
            raise OptionError(
                f"{path} has more than a word in line {number}; where it is the text that the reference was "
                "trained with, --count-words counts its words"
            )
        if parts:
            words.append(parts[0])
            counts.append(int(parts[1]) if len(parts) == 2 else 1)
    if EOS not in words:
        words, counts = [EOS, *words], [1, *counts]
    return _checked(words, counts, types, path)


def count_words(path: Path, types: int, lower_case: bool) -> Vocabulary:
    """Count the words of a text as the reference does: `<eos>` first, then all, the most frequent first.

    Words as frequent as each other come in the order in which the text has them.

    Args:
        path: of the text that the reference counted.
        types: number of words that the weights are for.
        lower_case: whether it took the words in lower case.
    Raises:
        OptionError: it has another number of words.
    """
    counter: Counter[str] = Counter()
    for line in _lines(path):
        counter.update((line.lower() if lower_case else line).split())
    found = [(word, count) for word, count in counter.most_common() if word != EOS]
    words = [EOS, *(word for word, _ in found)]
    return _checked(words, [1, *(count for _, count in found)], types, path)


def _lines(path: Path) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return list(file)
    except UnicodeDecodeError:
        raise OptionError(
            f"{path} is not a text in UTF-8; the reference's own cache.pt can be read only by its code, "
            "since loading it runs code: give a file with one word per line "
            "('\\n'.join(corpus.vocab.idx2sym)), or the text that was counted with --count-words"
        ) from None


def _checked(words: list[str], counts: list[int], types: int, path: Path) -> Vocabulary:
    if len(words) != types:
        raise OptionError(
            f"{path} has {len(words)} words ({EOS} counted), and the weights are for {types}: it is not the "
            "vocabulary that they were trained with"
        )
    if len(set(words)) != len(words):
        twice = Counter(words).most_common(1)[0][0]
        raise OptionError(f"{path} has the word {twice} twice; every word has one number")
    for word in _TAKEN:
        if word in words:
            raise OptionError(f"{path} has the word {word}, which fairseq's dictionaries reserve")
    return Vocabulary(tuple(words), tuple(counts))


@dataclass(frozen=True)
class Placement:
    """Where fairseq's dictionary has the words of the reference.

    Its first band is fairseq's four symbols, of which `</s>` is the reference's `<eos>` and `<unk>` its
    `<unk>`, and then what else is in the reference's first band, in its order. All other bands are the
    reference's as they are, and begin and end `shift` numbers later.

    Attributes:
        first: for each type of fairseq's first band its number in the reference, or -1: there is none.
        shift: types that fairseq's dictionary has more.
        words: what follows fairseq's symbols, with counts.
    """

    first: tuple[int, ...]
    shift: int
    words: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, vocabulary: Vocabulary, first_band: int, path: Path) -> Placement:
        """Place a vocabulary whose first band has `first_band` words.

        Args:
            vocabulary: of the reference.
            first_band: number of its words there.
            path: of the vocabulary, for the sentence.
        Raises:
            OptionError: a word that fairseq has in the first band is in another one.
        """
        number = {word: i for i, word in enumerate(vocabulary.words)}
        for word in (EOS, UNK):
            if number.get(word, 0) >= first_band:
                raise OptionError(
                    f"{path} has {word} as number {number[word]}, beyond the softmax's first band of "
                    f"{first_band} words, where fairseq keeps it"
                )
        symbols = (-1, -1, number.get(EOS, -1), number.get(UNK, -1))
        others = [i for i in range(len(vocabulary.words)) if i not in symbols]
        first = (*symbols, *(i for i in others if i < first_band))
        words = tuple((vocabulary.words[i], vocabulary.counts[i]) for i in others)
        return cls(first, len(first) - first_band, words)

    @property
    def knows_unknown(self) -> bool:
        """Whether the reference has a word for those that it does not know."""
        return self.first[SYMBOLS.index(UNK)] >= 0

    def symbols(self) -> list[str]:
        """All types of fairseq's dictionary, in order."""
        return [*SYMBOLS, *(word for word, _ in self.words)]

    def dictionary(self) -> str:
        """The contents of fairseq's dict.txt."""
        return "".join(f"{word} {count}\n" for word, count in self.words)
