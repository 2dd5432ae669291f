"""A row of the table of patches: a function of fairseq that has a fault, and its replacement."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = "_fairseq_deq_patch"

#: Versions that have a fault: all that this package works with, or one distribution of fairseq.
ALL = "fairseq >=0.12.2"
VE = "ve-fairseq 0.12.3"


@dataclass(frozen=True)
class Patch:
    """One function of fairseq that has a fault, and its replacement.

    Attributes:
        name: its name in `FAIRSEQ_DEQ_PATCHES`; patches that correct one fault together share a name.
        target: dotted name of the function.
        fault: what is wrong with it, in one sentence.
        versions: the versions of fairseq that have the fault.
        replacement: takes the function and returns the one to use.
        is_there: whether the fault occurs with the installed torch and numpy and on this device.
    """

    name: str
    target: str
    fault: str
    versions: str
    replacement: Callable[[Any], Any]
    is_there: Callable[[], bool] = lambda: True

    def apply(self) -> str:
        """Replace the target.

        Returns:
            the state to print: `active`, `not needed` or `target is gone`.
        """
        if not self.is_there():
            return "not needed"
        places = [*_owners(self.target)]
        if not places:
            return "target is gone"
        for owner, attribute in places:
            replace(owner, attribute, self.replacement)
        return "active"


def _owners(target: str) -> list[tuple[Any, str]]:
    """The modules or classes that hold the target, each with its name there; [] if there is none.

    A tool that is started as `python -m fairseq_cli.generate` has its functions in `__main__` as well.
    """
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            modules: list[Any] = [importlib.import_module(module_name)]
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise
            continue
        main: Any = sys.modules.get("__main__")
        if getattr(getattr(main, "__spec__", None), "name", None) == module_name:
            modules.append(main)
        owners = []
        for owner in modules:
            for part in parts[end:-1]:
                owner = getattr(owner, part, None)
            if getattr(owner, parts[-1], None) is not None:
                owners.append((owner, parts[-1]))
        return owners
    return []


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrap(owner.name)`; a second call with the same `wrap` changes nothing.

    Args:
        owner: the module or class that holds the function.
        name: the function's name there. If there is none, as in another version of fairseq, nothing happens.
        wrap: takes the function and returns the one to use. The original stays available as `__wrapped__`.
    """
    original = getattr(owner, name, None)
    applied = getattr(original, _MARK, ())
    if original is None or wrap in applied:
        return
    replacement = wrap(original)
    if callable(original):
        replacement = functools.wraps(original)(replacement)
        setattr(replacement, _MARK, (*applied, wrap))
    is_static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)
