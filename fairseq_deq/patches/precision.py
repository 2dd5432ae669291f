"""Mixed precision without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._patch import replace


def autocast_on_the_cpu() -> None:
    """Let `--amp` train in bfloat16 on a CPU.

    The fault: fairseq's `--amp` asks for the autocast of CUDA alone, so that on a CPU the option is taken
    and everything computed in float32. bfloat16 has the exponents of float32 and needs no loss scaling.
    """
    from fairseq.tasks.fairseq_task import FairseqTask

    replace(FairseqTask, "train_step", _under_autocast)


def _under_autocast(train_step: Callable[..., Any]) -> Callable[..., Any]:
    from fairseq.optim.amp_optimizer import AMPOptimizer

    def wrapper(
        self: Any, sample: Any, model: Any, criterion: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        on_cpu = next(model.parameters()).device.type == "cpu"
        # The backward pass is inside too: a layer that is evaluated again there gets the same types.
        with torch.autocast("cpu", torch.bfloat16, enabled=on_cpu and isinstance(optimizer, AMPOptimizer)):
            return train_step(self, sample, model, criterion, optimizer, *args, **kwargs)

    return wrapper
