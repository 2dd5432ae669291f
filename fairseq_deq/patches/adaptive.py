"""Faults of fairseq's adaptive input and adaptive softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def log_prob_cannot_be_trained() -> bool:
    """Whether autograd refuses the log-probabilities of fairseq's adaptive softmax."""
    from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

    # fork_rng: an import must not move the random state of the program.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        softmax = AdaptiveSoftmax(4, 4, [2], dropout=0.0)
        log_prob = softmax.get_log_prob(torch.zeros(1, 1, 4), None)
        try:
            log_prob.sum().backward()
        except RuntimeError:
            return True
    return False


def with_log_prob_that_can_be_trained(get_log_prob: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same values, computed without changing in place a tensor that autograd needs."""
    return _get_log_prob


def _get_log_prob(self: Any, input: Tensor, target: Tensor | None) -> Tensor:
    batch, length, dim = input.size()
    input = input.contiguous().view(-1, dim)
    rows_of_cluster = None if target is None else self.adapt_target(target)[1]

    head = self.head(input)
    head_size = self.cutoff[0] + len(self.tail)
    log_prob = head.new_zeros(input.size(0), self.vocab_size)
    log_prob[:, :head_size] = self.lsm(head)
    cluster_log_prob = log_prob[:, self.cutoff[0] : head_size].clone()

    for i, tail in enumerate(self.tail):
        start, end = self.cutoff[i], self.cutoff[i + 1]
        if rows_of_cluster is None:
            log_prob[:, start:end] = self.lsm(tail(input)) + cluster_log_prob[:, i, None]
        elif rows_of_cluster[i] is not None:
            rows = rows_of_cluster[i]
            log_prob[rows, start:end] = self.lsm(tail(input[rows])) + cluster_log_prob[rows, i, None]
    return log_prob.view(batch, length, -1)


def with_zeroed_float_tensor(init: Callable[..., None]) -> Callable[..., None]:
    """Zero the buffer `_float_tensor`. It is uninitialised, so checkpoints of equal runs would differ."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        buffer = getattr(self, "_float_tensor", None)
        if buffer is not None:
            buffer.zero_()

    return wrapper
