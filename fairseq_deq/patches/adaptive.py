"""Faults of fairseq's adaptive input and adaptive softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._patch import replace


def make_adaptive_log_prob_differentiable() -> None:
    """Let `--criterion cross_entropy` train a model with an adaptive softmax.

    The fault: `AdaptiveSoftmax.get_log_prob` adds the cluster's log-probability in place to the output of a
    log-softmax, which autograd needs unchanged, so the backward pass ends in "one of the variables needed
    for gradient computation has been modified by an inplace operation". The values are the same as before.
    """
    from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

    if _log_prob_can_be_trained(AdaptiveSoftmax):
        return
    replace(AdaptiveSoftmax, "get_log_prob", lambda original: _get_log_prob)


def _log_prob_can_be_trained(adaptive_softmax: Any) -> bool:
    # fork_rng: an import must not move the random state of the program.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        softmax = adaptive_softmax(4, 4, [2], dropout=0.0)
        log_prob = softmax.get_log_prob(torch.zeros(1, 1, 4), None)
        try:
            log_prob.sum().backward()
        except RuntimeError:
            return False
    return True


def _get_log_prob(self: Any, input: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
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


def initialise_float_tensors() -> None:
    """Make checkpoints of adaptive models a function of the run alone.

    The fault: `AdaptiveInput` and the tied head of `AdaptiveSoftmax` register a buffer `_float_tensor` of
    uninitialised memory and save it, so two checkpoints of equal runs differ, and the number may be NaN.
    """
    from fairseq.modules import adaptive_input, adaptive_softmax

    for owner in (adaptive_input.AdaptiveInput, getattr(adaptive_softmax, "TiedHeadModule", None)):
        if owner is not None:
            replace(owner, "__init__", _with_zeroed_float_tensor)


def _with_zeroed_float_tensor(init: Callable[..., None]) -> Callable[..., None]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        buffer = getattr(self, "_float_tensor", None)
        if buffer is not None:
            buffer.zero_()

    return wrapper
