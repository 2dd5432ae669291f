"""Tasks whose sequences are drawn from a seed, all of one length, and held in memory."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass import FairseqDataclass
from torch import Tensor
from typing_extensions import Self

from ..errors import OptionError
from ..options import check_values, option
from ._careful import CarefulTask

SPLITS = {"train": 0, "valid": 1, "test": 2}


@dataclass
class DrawnConfig(FairseqDataclass):
    """Options of every such task."""

    train_size: int = option(20000, "number of training sequences", valid="[1, inf)")
    valid_size: int = option(
        2000, "number of sequences for validation, and as many for test", valid="[1, inf)"
    )
    data_seed: int = option(
        1111, "seed of the sequences (--seed is that of the training)", valid="[0, 1000000000]"
    )

    # fairseq's language models ask their task for these.
    tokens_per_sample: int = option(
        0, "positions per sequence; 0: as the length options above give", valid="[0, inf)"
    )
    max_target_positions: int = option(
        100000, "largest number of positions, for models with absolute positions", valid="[1, inf)"
    )
    add_bos_token: bool = option(False, "must be off: a sequence begins with its first symbol")


class SequenceDataset(FairseqDataset):
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


class DrawnTask(CarefulTask):
    """A task of sequences that `draw` makes, over a dictionary of `symbols`.

    Attributes:
        name: as `--task` has it.
        options: the dataclass of its options.
        length_options: what makes the length of a sequence, for the sentence that refuses another.
    """

    name: str
    options: type
    length_options: str

    def __init__(self, cfg: Any, dictionary: Dictionary) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> Self:
        """The task, with the dictionary of its symbols.

        Raises:
            ValueError: an option cannot work; the sentence names it and the valid values.
        """
        check_values(cfg, cls.options)
        if cfg.add_bos_token:
            raise OptionError(f"--add-bos-token does not work with --task {cls.name}; leave it out")
        length = cls.length(cfg)
        if cfg.tokens_per_sample not in (0, length):
            raise OptionError(
                f"--tokens-per-sample is {cls.length_options} = {length} here, or 0; got "
                f"{cfg.tokens_per_sample}"
            )
        dictionary = Dictionary()
        for symbol in cls.symbols(cfg):
            dictionary.add_symbol(symbol)
        return cls(cfg, dictionary)

    @classmethod
    @abstractmethod
    def length(cls, cfg: Any) -> int:
        """L, the positions of a sequence."""

    @classmethod
    @abstractmethod
    def symbols(cls, cfg: Any) -> Iterable[str]:
        """What a sequence is made of, by number."""

    @abstractmethod
    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `count` sequences, (N, L) each, as numbers of symbols."""

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, **kwargs: Any) -> None:
        """Draw the sequences of `train`, `valid` or `test`.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise OptionError(f"{self.name} has the splits {', '.join(SPLITS)}, not {split!r}")
        cfg = self.cfg
        count = cfg.train_size if split == "train" else cfg.valid_size
        # One stream of seeds per split, so that a longer training set leaves valid and test as they are.
        x, y = self.draw(count, len(SPLITS) * cfg.data_seed + SPLITS[split])
        first = self.dictionary.nspecial
        self.datasets[split] = SequenceDataset(x + first, y + first)

    def max_positions(self) -> int:
        """The sequences are as long as they are."""
        return self.length(self.cfg)

    @property
    def source_dictionary(self) -> Dictionary:
        """The symbols (and the four special ones of fairseq, which do not occur)."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The same."""
        return self.dictionary
