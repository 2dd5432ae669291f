"""`--lr-scheduler cosine_from_zero`: the learning rate of the reference code's Transformer."""

import math
from dataclasses import dataclass
from typing import Any, List, Optional  # noqa: UP035

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from ..errors import OptionError
from ..options import check_values, option


@dataclass
class CosineFromZeroConfig(FairseqDataclass):
    """Options of the schedule."""

    warmup_updates: int = option(0, "number of updates of linear warm-up", valid="[0, inf)")
    min_lr: float = option(0.0, "learning rate at --max-update", valid="[0, inf)")
    lr: List[float] = II("optimization.lr")  # noqa: UP006  (fairseq reads the old type)
    max_update: int = II("optimization.max_update")


@register_lr_scheduler("cosine_from_zero", dataclass=CosineFromZeroConfig)
class CosineFromZero(FairseqLRScheduler):
    """A cosine whose first `warmup_updates` are replaced by a straight line; W, N = warm-up, max_update.

        lr(n) = lr * n / W                                                       for n < W,
        lr(n) = min_lr + (lr - min_lr) * (1 + cos(pi * n / N)) / 2               for W <= n <= N,
    and min_lr after that. fairseq's `cosine` starts its half period at W instead of at 0, and so is a little
    higher everywhere between W and N.

    Source: the training script of Bai, Kolter, Koltun (2019, arXiv 1909.01377).
    """

    def __init__(self, cfg: CosineFromZeroConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        check_values(cfg, CosineFromZeroConfig)
        if len(cfg.lr) > 1:
            raise OptionError(f"--lr-scheduler cosine_from_zero takes one --lr, got {len(cfg.lr)}")
        if cfg.max_update <= 0 or not 0 <= cfg.warmup_updates <= cfg.max_update:
            raise OptionError(
                "--lr-scheduler cosine_from_zero needs --max-update above 0 and --warmup-updates in "
                f"[0, --max-update]; got {cfg.max_update} and {cfg.warmup_updates}"
            )
        if not 0 <= cfg.min_lr <= cfg.lr[0]:
            raise OptionError(f"--min-lr must lie in [0, --lr], got {cfg.min_lr}")
        self.step_update(0)

    def learning_rate(self, num_updates: int) -> float:
        """The learning rate after `num_updates` updates, that is, of the update to come."""
        peak, low, end = self.cfg.lr[0], self.cfg.min_lr, self.cfg.max_update
        if num_updates < self.cfg.warmup_updates:
            return peak * num_updates / self.cfg.warmup_updates
        return low + (peak - low) * (1 + math.cos(math.pi * min(num_updates, end) / end)) / 2

    def step(self, epoch: int, val_loss: Optional[float] = None) -> float:
        """The end of an epoch changes nothing."""
        super().step(epoch, val_loss)
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        """Set the learning rate of the update to come."""
        self.optimizer.set_lr(self.learning_rate(num_updates))
        return self.optimizer.get_lr()
