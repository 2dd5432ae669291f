"""Faults in how fairseq cuts a data set into batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._patch import replace


def keep_last_batch() -> None:
    """Put back the last batch of an epoch or of a validation set.

    The fault: if the size of the last batch is not a multiple of `--required-batch-size-multiple` (8 unless
    the user says otherwise), `batch_by_size` drops it. Training and validation then lose up to a whole
    batch: with 7 blocks there is no batch at all. The option's own documentation asks for batches that are
    "less than N or a multiple of N", so the short batch is a valid one.
    """
    from fairseq.data import data_utils

    replace(data_utils, "batch_by_size", _with_last_batch)


def _with_last_batch(batch_by_size: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(
        indices: Any,
        num_tokens_fn: Callable[[int], int],
        num_tokens_vec: Any = None,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
        fixed_shapes: Any = None,
    ) -> Sequence[Any]:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        if len(indices) == 0:
            return []
        batches = batch_by_size(
            indices,
            num_tokens_fn,
            num_tokens_vec=num_tokens_vec,
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_batch_size_multiple=required_batch_size_multiple,
            fixed_shapes=fixed_shapes,
        )
        kept = sum(len(batch) for batch in batches)
        if fixed_shapes is None and kept < len(indices):
            # Batches are consecutive pieces of `indices`, so what is lost is its end.
            batches = [*batches, indices[kept:]]
        return batches

    return wrapper


def batch_alike_after_resuming() -> None:
    """Cut a resumed run's data into the batches of the uninterrupted run.

    The fault: which blocks make up a batch is drawn once, when a process starts, with `--seed` plus the epoch
    it starts in. A run resumed in the second epoch or later trains on other batches than the run that was
    not interrupted. Here the first epoch counts wherever batches are kept from one epoch to the next.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(FairseqTask, "get_batch_iterator", _with_batches_of_the_first_epoch)


def _with_batches_of_the_first_epoch(get_batch_iterator: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(get_batch_iterator)

    def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
        bound = signature.bind(self, *arguments, **options)
        bound.apply_defaults()
        values = bound.arguments
        seed, epoch = values["seed"], values["epoch"]
        redrawn = values.get("update_epoch_batch_itr") or getattr(self.cfg, "rebuild_batches", False)
        if redrawn or epoch <= 1 or not self.can_reuse_epoch_itr(values["dataset"]):
            return get_batch_iterator(*bound.args, **bound.kwargs)
        values["seed"] = seed + 1 - epoch  # fairseq draws with seed + epoch
        iterator = get_batch_iterator(*bound.args, **bound.kwargs)
        iterator.seed = seed  # the order of the batches still follows the epoch
        return iterator

    return wrapper
