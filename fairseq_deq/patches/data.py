"""The fault: fairseq opens binarised texts without checking that their files belong together."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable
from typing import Any

from ..data_folder import check_text, write_fingerprint


def after_checking(load_indexed_dataset: Callable[..., Any]) -> Callable[..., Any]:
    """Before a text is opened, compare it with its index and its dictionary."""
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


def then_fingerprinting(main: Callable[..., Any]) -> Callable[..., Any]:
    """Write a fingerprint of the texts and their dictionary beside them: see `write_fingerprint`."""

    def wrapper(args: Any) -> Any:
        result = main(args)
        write_fingerprint(args.destdir)
        return result

    return wrapper
