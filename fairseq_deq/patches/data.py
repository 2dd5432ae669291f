"""Binarised texts are opened without a look at whether their files belong together."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable
from typing import Any

from ..data_folder import check_text, write_fingerprint
from ._patch import replace


def check_texts_when_opened() -> None:
    """Compare a text with its index and its dictionary when it is opened.

    The fault: an index of another text, a text that was cut short, numbers beyond the dictionary and a
    dictionary that changed since are taken in silence, or end in a traceback of torch.
    """
    from fairseq.data import data_utils

    replace(data_utils, "load_indexed_dataset", _after_checking)


def _after_checking(load_indexed_dataset: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load_indexed_dataset)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        path, dictionary, combine = (call.arguments[name] for name in ("path", "dictionary", "combine"))
        for k in itertools.count():
            part = f"{path}{k or ''}"
            if not os.path.exists(part + ".idx") and not os.path.exists(part + ".bin"):
                break
            check_text(part, dictionary)
            if not combine:
                break
        return load_indexed_dataset(*args, **kwargs)

    return wrapper


def keep_fingerprints_of_data() -> None:
    """Let fairseq-preprocess keep with its texts what tells them and their dictionary from others.

    The fault: a data folder says nothing of the dictionary that its numbers stand for.
    """
    import fairseq_cli.preprocess as tool

    replace(tool, "main", _then_fingerprinting)


def _then_fingerprinting(main: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(args: Any) -> Any:
        result = main(args)
        write_fingerprint(args.destdir)
        return result

    return wrapper
