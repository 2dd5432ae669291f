"""How fairseq cuts a data set into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def with_last_batch(batch_by_size: Callable[..., Any]) -> Callable[..., Any]:
    """Put back the last batch of an epoch or of a validation set, which fairseq drops.

    fairseq drops it if its size is not a multiple of `--required-batch-size-multiple`, 8 by default. A data
    set of 7 blocks has no batch at all then. The option's own documentation asks for batches that are "less
    than N or a multiple of N", so the short batch is valid.
    """

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
            # Batches are consecutive pieces of `indices`, so the dropped ones are its end.
            batches = [*batches, indices[kept:]]
        return batches

    return wrapper
