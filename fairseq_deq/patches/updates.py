"""Faults in when fairseq tells the model how far training is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._patch import replace


def announce_finished_updates() -> None:
    """Tell models that ask for it (`counts_finished_updates`) how many updates are finished.

    The fault: `set_num_updates(n)` is called before update n+1 only, so the validation after update N
    evaluates the model as of N-1, and a checkpoint loaded afterwards as of N: a model that changes its phase
    by update number is evaluated as two different ones.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(FairseqTask, "optimizer_step", _then_announce)


def _then_announce(optimizer_step: Callable[..., None]) -> Callable[..., None]:
    def wrapper(self: Any, optimizer: Any, model: Any, update_num: int) -> None:
        optimizer_step(self, optimizer, model=model, update_num=update_num)
        if getattr(model, "counts_finished_updates", False):
            model.set_num_updates(update_num + 1)

    return wrapper
