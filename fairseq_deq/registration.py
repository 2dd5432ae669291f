"""When fairseq gets to know this package."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ._requirements import fairseq_is_installed, require_fairseq

_is_registered = False


def register() -> None:
    """Make the models, tasks, criterions and optimizers known to fairseq, and apply the patches, once.

    Raises:
        ImportError: there is no usable fairseq; the sentence says what to type.
        OptionError: `FAIRSEQ_DEQ_PATCHES` names a patch that does not exist.
    """
    global _is_registered
    from .patches import install, switched_off

    switched_off()  # before fairseq is imported: what is misspelt is no fault of fairseq's
    require_fairseq()
    if _is_registered:
        return
    _is_registered = True
    install()
    from . import criterions, models, optim, tasks  # noqa: F401  (each registers itself with fairseq)


def register_with_fairseq(at_once: bool) -> None:
    """Register when the program imports fairseq, and import nothing until then.

    Args:
        at_once: register now where it has imported fairseq already; otherwise that one is left as it is.
    """
    if "fairseq" in sys.modules:
        if at_once:
            register()
    elif fairseq_is_installed():
        sys.meta_path.insert(0, _Watcher())


def is_named_by_import(package: str) -> bool:
    """Whether the import under way names the package itself, and not a module in it.

    To be called from the package's `__init__`. `import package.solvers` runs that as well, and says that the
    program wants the solvers alone.
    """
    named: Any = package
    frame = sys._getframe(2)  # what runs `__init__`: the machinery of imports, up to the statement
    while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib._bootstrap"):
        if frame.f_code.co_name == "_find_and_load":
            named = frame.f_locals.get("name", named)
        frame = frame.f_back  # type: ignore[assignment]
    return bool(named == package)


class _Watcher(importlib.abc.MetaPathFinder):
    """Notices the import of fairseq, and registers after it."""

    def __init__(self) -> None:
        self._is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "fairseq" or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegistering(spec.loader, self)
        return spec


class _ThenRegistering(importlib.abc.Loader):
    """The loader of fairseq, which registers once fairseq is there."""

    def __init__(self, loader: importlib.abc.Loader, watcher: _Watcher) -> None:
        self._loader, self._watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        sys.meta_path.remove(self._watcher)
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register()
