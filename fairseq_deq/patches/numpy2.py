"""fairseq uses `np.compat`, which numpy 2 no longer has."""

from __future__ import annotations

import importlib
import types
from typing import Any

import numpy as np

_USERS = ("fairseq.data.token_block_dataset", "fairseq.data.language_pair_dataset")


class _NumpyWithCompat(types.ModuleType):
    """numpy with the one name of `np.compat` that fairseq uses."""

    def __init__(self) -> None:
        super().__init__("numpy")
        self.compat = types.SimpleNamespace(long=int)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def give_fairseq_np_compat() -> None:
    """Let `--sample-break-mode eos` and fairseq-interactive work with numpy 2.

    The fault: `np.compat.long` in two data sets of fairseq ends in an AttributeError, since numpy 2 removed
    `np.compat`. Only those two modules see the name again; numpy itself stays as it is, because other
    packages tell numpy versions apart by what numpy has.
    """
    if hasattr(np, "compat"):
        return
    for name in _USERS:
        module = importlib.import_module(name)
        if getattr(module, "np", None) is np:
            module.np = _NumpyWithCompat()  # type: ignore[attr-defined]
