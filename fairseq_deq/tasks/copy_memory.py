"""`copy_memory`: repeat ten symbols after a long silence."""

import math
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

SYMBOLS = 8  # written 1 to 8; 0 is silence and 9 asks for the answer
SILENCE, ASK = 0, 9
DEFINITIONS = ("paper", "tcn")

Definition = ChoiceEnum(list(DEFINITIONS))


@dataclass
class CopyMemoryConfig(DrawnConfig):
    """Options of the task."""

    blank_len: int = option(
        400, "T: number of positions between the symbols and the answer", valid="[1, inf)"
    )
    copy_len: int = option(10, "number of symbols to remember", valid="[1, inf)")
    copy_definition: Definition = option(
        "paper", "input while the answer is due: one 9, then zeros (paper), or 9 throughout (tcn)"
    )


def generate(count: int, blank_len: int, copy_len: int, definition: str, seed: int) -> tuple[Tensor, Tensor]:
    """Draw sequences.

    With symbols s in {1..8} drawn uniformly and independently, of length K, and T = `blank_len`,
        x = s, 0 (T - 1 times), 9, 0 (K times)        for `paper`,
        x = s, 0 (T - 1 times), 9, 9 (K times)        for `tcn`,
        y = 0 (T + K times), s.

    Args:
        count: sequences, N.
        blank_len, copy_len: T and K.
        definition: `paper` or `tcn`.
        seed: the same seed gives the same sequences, whatever the platform.
    Returns:
        x and y, (N, T + 2K) each, of numbers 0 to 9.
    Source: Bai, Kolter, Koltun (2019, arXiv 1909.01377), appendix F; `tcn`: Bai, Kolter, Koltun (2018,
        arXiv 1803.01271).
    """
    symbols = torch.from_numpy(np.random.RandomState(seed).randint(1, SYMBOLS + 1, (count, copy_len)))
    x = torch.full((count, blank_len + 2 * copy_len), SILENCE)
    x[:, :copy_len] = symbols
    x[:, blank_len + copy_len - 1] = ASK
    if definition == "tcn":
        x[:, blank_len + copy_len :] = ASK
    y = torch.full_like(x, SILENCE)
    y[:, blank_len + copy_len :] = symbols
    return x, y


def memoryless_loss(blank_len: int, copy_len: int) -> float:
    """The loss of a model that times the answer but guesses its symbols: K ln 8 / (T + 2K) nats."""
    return copy_len * math.log(SYMBOLS) / (blank_len + 2 * copy_len)


@register_task("copy_memory", dataclass=CopyMemoryConfig)
class CopyMemoryTask(DrawnTask):
    """Repeat the first symbols of a sequence at its end.

    The log has `copy_loss`, the loss in the papers' units: cross-entropy in nats, averaged over all
    positions of a sequence.
    """

    name = "copy_memory"
    options = CopyMemoryConfig
    length_options = "--blank-len + 2 x --copy-len"

    @classmethod
    def length(cls, cfg: Any) -> int:
        """T + 2K."""
        return int(cfg.blank_len + 2 * cfg.copy_len)

    @classmethod
    def symbols(cls, cfg: Any) -> Iterable[str]:
        """The digits."""
        return map(str, range(10))

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """x and y of `generate`."""
        cfg = self.cfg
        return generate(count, cfg.blank_len, cfg.copy_len, str(cfg.copy_definition), seed)

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's metrics, and the loss in the papers' units."""
        super().reduce_metrics(logging_outputs, criterion)
        ntokens = float(sum(log.get("ntokens", 0) for log in logging_outputs))
        loss = float(sum(log.get("loss", 0) for log in logging_outputs))
        if ntokens > 0:
            metrics.log_scalar("copy_loss", loss / ntokens, ntokens, round=9)
