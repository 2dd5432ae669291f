"""`copy_memory`: repeat ten symbols after a long silence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import register_task
from torch import Tensor

from ..errors import OptionError
from ..options import check_values, option
from ._careful import CarefulTask

SYMBOLS = 8  # written 1 to 8; 0 is silence and 9 asks for the answer
SILENCE, ASK = 0, 9
DEFINITIONS = ("paper", "tcn")
SPLITS = {"train": 0, "valid": 1, "test": 2}

Definition = ChoiceEnum(list(DEFINITIONS))


@dataclass
class CopyMemoryConfig(FairseqDataclass):
    """Options of the task."""

    blank_len: int = option(400, "T: positions between the symbols and the answer", valid="[1, inf)")
    copy_len: int = option(10, "symbols to remember", valid="[1, inf)")
    train_size: int = option(20000, "sequences to train on", valid="[1, inf)")
    valid_size: int = option(2000, "sequences of valid, and of test", valid="[1, inf)")
    copy_definition: Definition = option(
        "paper", "paper: one 9 asks, and silence lasts while answering; tcn: 9 lasts while answering"
    )
    data_seed: int = option(
        1111, "seed of the sequences, apart from --seed of the training", valid="[0, 1000000000]"
    )

    # fairseq's language models ask their task for these.
    tokens_per_sample: int = option(
        0, "positions of a sequence; 0: what --blank-len and --copy-len make", valid="[0, inf)"
    )
    max_target_positions: int = option(
        100000, "positions that a model with absolute positions must have", valid="[1, inf)"
    )
    add_bos_token: bool = option(False, "must be off: a sequence begins with its symbols")


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


class CopyMemoryDataset(FairseqDataset):
    """Sequences of equal length as fairseq's batches.

    Args:
        x, y: inputs and targets, (N, L) each, as indices of the dictionary.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "source": self.x[index], "target": self.y[index]}

    def __len__(self) -> int:
        return self.x.shape[0]

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """fairseq's batch of `samples`; {} of none."""
        if not samples:
            return {}
        source = torch.stack([sample["source"] for sample in samples])
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": source.numel(),
            "net_input": {
                "src_tokens": source,
                "src_lengths": torch.full((len(samples),), source.shape[1]),
            },
            "target": torch.stack([sample["target"] for sample in samples]),
        }

    def num_tokens(self, index: int) -> int:
        """Positions of a sequence."""
        return self.x.shape[1]

    def size(self, index: int) -> int:
        """Positions of a sequence."""
        return self.x.shape[1]

    def ordered_indices(self) -> np.ndarray:
        """All sequences, as they were drawn."""
        return np.arange(len(self))


@register_task("copy_memory", dataclass=CopyMemoryConfig)
class CopyMemoryTask(CarefulTask):
    """Repeat the first symbols of a sequence at its end.

    The log has `copy_loss`, the loss in the papers' units: cross-entropy in nats, averaged over all
    positions of a sequence.
    """

    def __init__(self, cfg: CopyMemoryConfig, dictionary: Dictionary) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary

    @classmethod
    def setup_task(cls, cfg: CopyMemoryConfig, **kwargs: Any) -> "CopyMemoryTask":
        """The task, with its dictionary of the digits.

        Raises:
            ValueError: an option cannot work; the sentence names it and the valid values.
        """
        check_values(cfg, CopyMemoryConfig)
        if cfg.add_bos_token:
            raise OptionError("--add-bos-token does not work with --task copy_memory; leave it out")
        length = cfg.blank_len + 2 * cfg.copy_len
        if cfg.tokens_per_sample not in (0, length):
            raise OptionError(
                f"--tokens-per-sample is --blank-len + 2 x --copy-len = {length} here, or 0; got "
                f"{cfg.tokens_per_sample}"
            )
        dictionary = Dictionary()
        for digit in range(10):
            dictionary.add_symbol(str(digit))
        return cls(cfg, dictionary)

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, **kwargs: Any) -> None:
        """Draw the sequences of `train`, `valid` or `test`.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise OptionError(f"copy_memory has the splits {', '.join(SPLITS)}, not {split!r}")
        cfg = self.cfg
        count = cfg.train_size if split == "train" else cfg.valid_size
        # One stream of seeds a split, so that a longer training set leaves valid and test as they are.
        seed = len(SPLITS) * cfg.data_seed + SPLITS[split]
        x, y = generate(count, cfg.blank_len, cfg.copy_len, str(cfg.copy_definition), seed)
        first = self.dictionary.index("0")
        self.datasets[split] = CopyMemoryDataset(x + first, y + first)

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's metrics, and the loss in the papers' units."""
        super().reduce_metrics(logging_outputs, criterion)
        ntokens = float(sum(log.get("ntokens", 0) for log in logging_outputs))
        loss = float(sum(log.get("loss", 0) for log in logging_outputs))
        if ntokens > 0:
            metrics.log_scalar("copy_loss", loss / ntokens, ntokens, round=9)

    def max_positions(self) -> int:
        """The sequences are as long as they are."""
        return self.cfg.blank_len + 2 * self.cfg.copy_len

    @property
    def source_dictionary(self) -> Dictionary:
        """The digits 0 to 9 (and the four special symbols of fairseq, which do not occur)."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The same."""
        return self.dictionary
