"""The message of a training that stops because its numbers are no longer finite."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..errors import OptionError


def with_advice(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """End a diverged training of a model of this package in one sentence that says what to try.

    As before, the state is saved as crash.pt, and the log names the first module with a number that is not
    finite.
    """

    def wrapper(self: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train_step(self, samples, *args, **kwargs)
        except FloatingPointError as error:
            is_ours = str(getattr(self.cfg.model, "_name", "")).startswith("deq_")
            if not is_ours or "inconsistent between workers" in str(error):
                raise
            crash = os.path.join(self.cfg.checkpoint.save_dir, "crash.pt")
            reason = str(error).split(". ")[0].strip().rstrip(".")
            raise OptionError(
                f"training diverged at update {self.get_num_updates() + 1} ({reason}): go on from the last "
                "checkpoint with a lower --lr, a smaller --clip-norm or more --f-thres and --b-thres, or "
                f"start anew with --wnorm; the state is in {crash}, and the log above names the module"
            ) from error

    return wrapper
