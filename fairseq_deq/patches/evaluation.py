"""Cases in which fairseq-eval-lm prints a perplexity that is not the perplexity of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError


def with_finite_scores(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a perplexity over tokens whose scores are infinite or not a number.

    fairseq-eval-lm leaves tokens with an infinite score out of the sum, so the worst tokens improve the
    perplexity. Its message about them fails.
    """

    def wrapper(self: Any, models: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        hypotheses = generate(self, models, sample, *args, **kwargs)
        # Joined, so that there is one transfer from the device per batch.
        scores = torch.cat([row[0]["positional_scores"].reshape(-1) for row in hypotheses])
        failed = int((~torch.isfinite(scores)).sum())
        if failed:
            blocks = [int(i) for i, row in zip(sample["id"], hypotheses) if not _is_finite(row[0])]
            raise OptionError(
                f"{failed} of {scores.numel()} tokens of a batch got a score that is not finite (first in "
                f"block {blocks[0]}), so the text has no perplexity; check the checkpoint for NaN weights, "
                "evaluate without --fp16, and for an equilibrium model look at the solver's statistics"
            )
        return hypotheses

    return wrapper


def _is_finite(hypothesis: Any) -> bool:
    return bool(torch.isfinite(hypothesis["positional_scores"]).all())
