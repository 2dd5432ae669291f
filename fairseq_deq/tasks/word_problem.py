"""`word_problem`: keep track of the product of group elements, the plainest case of following a state."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.tasks import register_task
from torch import Tensor

from ..options import option
from ._drawn import DrawnConfig, DrawnTask

Permutation = tuple[int, ...]

# group -> permutations that generate it; place i has where point i goes.
GENERATORS: dict[str, tuple[Permutation, ...]] = {
    "Z2": ((1, 0),),
    "S3": ((1, 0, 2), (1, 2, 0)),
    "A5": ((1, 2, 0, 3, 4), (1, 2, 3, 4, 0)),
    "Z60": ((*range(1, 60), 0),),
    "A4xZ5": ((1, 2, 0, 3, 4, 5, 6, 7, 8), (1, 0, 3, 2, 4, 5, 6, 7, 8), (0, 1, 2, 3, 5, 6, 7, 8, 4)),
}

GroupName = ChoiceEnum(list(GENERATORS))


@dataclass
class WordProblemConfig(DrawnConfig):
    """Options of the task."""

    group: GroupName = option(
        "S3",
        "group whose elements are multiplied; Z2 is parity; Z60, A4xZ5 and A5 have 60 elements, and only A5 "
        "is not solvable",
    )
    word_len: int = option(16, "T: number of elements in a word", valid="[1, 100000]")


@functools.cache
def elements(group: str) -> tuple[Permutation, ...]:
    """All permutations of a group, in the order of their images; the identity comes first.

    Args:
        group: a name among `GENERATORS`.
    """
    identity = tuple(range(len(GENERATORS[group][0])))
    found, new = {identity}, [identity]
    while new:
        new = [p for a in new for b in GENERATORS[group] if (p := product(a, b)) not in found]
        found.update(new)
    return tuple(sorted(found))


def product(a: Permutation, b: Permutation) -> Permutation:
    """ab, which takes point i to a(b(i))."""
    return tuple(a[i] for i in b)


@functools.cache
def multiplication_table(group: str) -> Tensor:
    """The number of ab at place (a, b), (G, G) for the G elements of a group, in their order."""
    every = elements(group)
    number = {element: n for n, element in enumerate(every)}
    return torch.tensor([[number[product(a, b)] for b in every] for a in every])


def generate(count: int, word_len: int, group: str, seed: int) -> tuple[Tensor, Tensor]:
    """Draw words and multiply them out.

    With elements g_1 ... g_T of a group drawn uniformly and independently, at each position t
        x_t = g_t,
        y_t = g_1 g_2 ... g_t,
    where the product ab of two permutations applies b first: y_t = y_(t-1) g_t.

    Args:
        count: words, N.
        word_len: T.
        group: a name among `GENERATORS`.
        seed: the same seed gives the same words, whatever the platform.
    Returns:
        x and y, (N, T) each, of numbers of elements.
    Source: Liu, Ash, Goel, Krishnamurthy, Zhang (2023, arXiv 2210.10749); Merrill, Petty, Sabharwal (2024,
        arXiv 2404.08819).
    """
    table = multiplication_table(group)
    x = torch.from_numpy(np.random.RandomState(seed).randint(0, len(table), (count, word_len)))
    y = x.clone()
    for t in range(1, word_len):
        y[:, t] = table[y[:, t - 1], x[:, t]]
    return x, y


@register_task("word_problem", dataclass=WordProblemConfig)
class WordProblemTask(DrawnTask):
    """Say the product of all elements so far, at every position of a word.

    With `--criterion deq_lm_loss` the log has two shares of positions whose most probable element is the
    right one: `accuracy`, of all positions, and `last_accuracy`, of the last quarter of each word.
    """

    name = "word_problem"
    options = WordProblemConfig
    length_options = "--word-len"

    @classmethod
    def length(cls, cfg: Any) -> int:
        """T."""
        return int(cfg.word_len)

    @classmethod
    def symbols(cls, cfg: Any) -> Iterable[str]:
        """The elements by number, 0 the identity."""
        return map(str, range(len(elements(str(cfg.group)))))

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """x and y of `generate`."""
        return generate(count, self.cfg.word_len, str(self.cfg.group), seed)

    def counts(self, scores: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the criterion is to log of a batch, as sums.

        Args:
            scores: of every symbol, (B, T, V); the highest is the model's answer.
            target: (B, T), as indices of the dictionary.
        """
        right = scores.argmax(-1) == target
        last = right[:, -last_quarter(target.shape[1]) :]
        return {
            "right_sum": right.sum(),
            "last_right_sum": last.sum(),
            "last_sum": torch.tensor(last.numel(), device=target.device),
        }

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's metrics, and the shares of right answers where the criterion counted them."""
        super().reduce_metrics(logging_outputs, criterion)
        for name, right, of in (
            ("accuracy", "right_sum", "ntokens"),
            ("last_accuracy", "last_right_sum", "last_sum"),
        ):
            answers = float(sum(log[of] for log in logging_outputs if right in log))
            if answers > 0:
                share = float(sum(log[right] for log in logging_outputs if right in log)) / answers
                metrics.log_scalar(name, share, answers, round=4)


def last_quarter(word_len: int) -> int:
    """Positions of the last quarter of a word, at least 1."""
    return max(1, word_len // 4)
