"""A text read as parallel streams, and the passes over it that carry a memory along."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.data.iterators import CountingIterator, EpochBatchIterator
from torch import Tensor

from ..errors import OptionError
from ..layers.memory import Memory, MemoryCarrier

logger = logging.getLogger(__name__)


class StreamText(FairseqDataset):
    """A text as one sequence of tokens; item i is token i.

    Args:
        name: what messages call it.
        sentences: data set of 1-D tensors.
        sizes: their lengths.
        eos: the token that stands before the first one.
        pad: the token that fills up what is too short.
    """

    def __init__(self, name: str, sentences: Any, sizes: np.ndarray, eos: int, pad: int) -> None:
        self.name = name
        self.sentences = sentences
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self.eos, self.pad = eos, pad

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Tensor:
        return self.span(index, index + 1)

    def span(self, start: int, stop: int) -> Tensor:
        """Tokens `start` to `stop` (exclusive), (stop - start,); the one before the text is `eos`."""
        if start < 0:
            return torch.cat([torch.full((-start,), self.eos), self.span(0, stop)])
        if start == stop:
            return torch.empty(0, dtype=torch.long)
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        tokens = torch.cat([self.sentences[i] for i in range(first, last + 1)])
        offset = start - (int(self.ends[first - 1]) if first else 0)
        return tokens[offset : offset + stop - start].long()


class StreamBatches(torch.utils.data.Dataset):
    """Batches of a text that is cut into streams, one per row: item k holds the k-th block of every row.

    Args:
        text: the text.
        streams: number of streams, of all processes together.
        first: the first stream of this process.
        rows: number of streams of this process.
        block: tokens of a block.
        whole_blocks: leave the end of the text out, so that every block is full. Otherwise every token is in
            one block; the last ones are padded where a stream has ended.
    Raises:
        OptionError: there are fewer tokens than streams, and `whole_blocks` asks for one in each.
    """

    def __init__(
        self, text: StreamText, streams: int, first: int, rows: int, block: int, whole_blocks: bool
    ) -> None:
        self.text, self.streams, self.first, self.rows, self.block = text, streams, first, rows, block
        total = len(text)
        if whole_blocks:
            if total < streams:
                raise OptionError(
                    f"the text {text.name!r} has {total} tokens for {streams} streams (--batch-size, times "
                    "the number of processes); give a smaller --batch-size"
                )
            # A text of less than a block for each stream is one shorter block.
            length = max(total // streams // block * block, min(block, total // streams))
            lengths = np.full(streams, length)
        else:
            lengths = np.full(streams, total // streams)
            lengths[: total % streams] += 1
        self.starts = np.cumsum(lengths) - lengths
        self.stops = self.starts + lengths
        self.longest = int(lengths.max())
        #: Tokens that no batch holds.
        self.left_out = total - int(lengths.sum())

    def __len__(self) -> int:
        return -(-self.longest // self.block)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """fairseq's batch of block k; the source has at each target what precedes it in the text."""
        begin = k * self.block
        width = min(self.block, self.longest - begin)
        source = torch.full((self.rows, width), self.text.pad)
        target = source.clone()
        lengths = torch.zeros(self.rows, dtype=torch.long)
        for row in range(self.rows):
            stop = int(self.stops[self.first + row])
            start = min(int(self.starts[self.first + row]) + begin, stop)
            stop = min(start + width, stop)
            if start < stop:
                tokens = self.text.span(start - 1, stop)
                lengths[row] = stop - start
                source[row, : stop - start] = tokens[:-1]
                target[row, : stop - start] = tokens[1:]
        return {
            "id": torch.arange(self.rows) + self.first + k * self.streams,
            "nsentences": self.rows,
            "ntokens": int(lengths.sum()),
            "net_input": {"src_tokens": source, "src_lengths": lengths},
            "target": target,
        }


class StreamIterator(EpochBatchIterator):
    """fairseq's iterator over passes, each of which carries a memory from its first batch to its last.

    Workers load the text; the memory is added to the batches in the main process.

    Args:
        batches: the batches of this process.
        epoch: number of the first pass.
        num_workers: processes that load the text.
        buffer_size: batches loaded ahead.
    """

    def __init__(self, batches: StreamBatches, epoch: int, num_workers: int, buffer_size: int) -> None:
        self.batches = batches
        self._carried = MemoryCarrier()
        super().__init__(
            dataset=batches,
            collate_fn=_only,
            batch_sampler=[[k] for k in range(len(batches))],
            epoch=epoch,
            num_workers=num_workers,
            buffer_size=buffer_size,
            disable_shuffling=True,
            persistent_workers=False,
        )

    @property
    def memory(self) -> Memory | None:
        """What the batch fetched last left, in the latest pass."""
        return self._carried.after

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self._carried.after = memory

    @property
    def tokens_read(self) -> int:
        """Tokens of each stream in the batches fetched so far, in the latest pass."""
        return min(self.iterations_in_epoch * self.batches.block, self.batches.longest)

    def carry_on(self) -> MemoryCarrier:
        """The carrier of the next batch."""
        self._carried = MemoryCarrier(self._carried)
        return self._carried

    def _get_iterator_for_epoch(self, *args: Any, **kwargs: Any) -> CountingIterator | None:
        batches = super()._get_iterator_for_epoch(*args, **kwargs)
        if batches is None:  # fairseq's way to say that there is no such position
            return None
        self._carried = MemoryCarrier()
        return _CarryingIterator(batches, self)


class _CarryingIterator(CountingIterator):
    """Adds to each batch the carrier of its memory."""

    def __init__(self, batches: CountingIterator, owner: StreamIterator) -> None:
        self.total: int  # CountingIterator sets it
        super().__init__(batches, start=batches.n, total=len(batches))
        self._owner = owner

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        return {**batch, "net_input": {**batch["net_input"], "memory": self._owner.carry_on()}}

    def take(self, n: int) -> _CarryingIterator:
        """End after batch n."""
        self.total = min(self.total, n)
        self._itr.take(n)  # it counts from the same batch on
        return self


def _only(batches: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = batches
    return batch
