"""How fairseq's tools report an option that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import ProcessRaisedException

from ..errors import OptionError
from ._patch import replace

_NAME = f"{OptionError.__module__}.{OptionError.__qualname__}: "


def say_option_errors_in_one_sentence() -> None:
    """Print an `OptionError` as one sentence and end with status 1.

    The fault: the tools let every error end in a traceback of twenty lines, with what to type in the last;
    where they start processes, in two of them.
    """
    from fairseq.distributed import utils as distributed_utils

    replace(distributed_utils, "call_main", _in_one_sentence)


def _in_one_sentence(call_main: Callable[..., None]) -> Callable[..., None]:
    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        try:
            call_main(cfg, main, **kwargs)
        except OptionError as error:
            raise SystemExit(f"error: {error}") from None
        except ProcessRaisedException as error:
            # It holds the traceback of the process as text.
            sentence = str(error).rpartition(_NAME)[2].strip() if _NAME in str(error) else ""
            if not sentence:
                raise
            raise SystemExit(f"error: {sentence}") from None

    return wrapper
