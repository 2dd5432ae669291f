"""The fault: fairseq uses `np.compat`, which numpy 2 no longer has."""

from __future__ import annotations

import types
from typing import Any

import numpy as np


class _NumpyWithCompat(types.ModuleType):
    """numpy with the one name of `np.compat` that fairseq uses."""

    def __init__(self) -> None:
        super().__init__("numpy")
        self.compat = types.SimpleNamespace(long=int)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def numpy_has_no_compat() -> bool:
    """Whether numpy has no `np.compat`, as since version 2."""
    return not hasattr(np, "compat")


def with_np_compat(module: Any) -> Any:
    """numpy with `np.compat.long`, for one module of fairseq.

    numpy itself stays unchanged, because other packages recognise its version by the names that it has.
    """
    return _NumpyWithCompat() if module is np else module
