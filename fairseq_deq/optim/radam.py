"""`--optimizer radam`: torch's RAdam under fairseq's trainer."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, List  # noqa: UP035

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from ..errors import OptionError
from ..options import check_values, option


@dataclass
class RAdamConfig(FairseqDataclass):
    """Options of RAdam."""

    radam_betas: str = option("(0.9, 0.999)", "decay rates of the two moments")
    radam_eps: float = option(1e-8, "term added to the square root of the second moment", valid="(0, inf)")
    weight_decay: float = option(0.0, "decoupled weight decay", valid="[0, inf)")
    lr: List[float] = II("optimization.lr")  # noqa: UP006  (fairseq reads the old type)


@register_optimizer("radam", dataclass=RAdamConfig)
class RAdam(FairseqOptimizer):
    """Adam whose step is rectified while the second moment rests on few gradients; needs no warm-up.

    Source: Liu et al. (2020, arXiv 1908.03265).
    """

    def __init__(self, cfg: RAdamConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        check_values(cfg, RAdamConfig)
        self._optimizer = torch.optim.RAdam(params, **self.optimizer_config, decoupled_weight_decay=True)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What a resumed run takes from its command line instead of from the checkpoint."""
        lr = self.cfg.lr[0] if not isinstance(self.cfg.lr, float) else self.cfg.lr
        betas = _betas(self.cfg.radam_betas)
        return {"lr": lr, "betas": betas, "eps": self.cfg.radam_eps, "weight_decay": self.cfg.weight_decay}


def _betas(text: str) -> tuple[float, float]:
    try:
        first, second = (float(beta) for beta in ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError):
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise OptionError(f"--radam-betas must be two numbers in [0, 1), like '(0.9, 0.999)'; got {text}")
    return first, second
