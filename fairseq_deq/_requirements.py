"""Checks that what the plugin needs is installed, whole and new enough, and says what to type if not."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

# Before 2.10 a checkpoint can corrupt memory (CVE-2026-24747), before 2.6 run code (CVE-2025-32434). setup.py
# reads this line too.
TORCH_MINIMUM = "2.10"
NUMPY_MINIMUM = "1.21"
FAIRSEQ_MINIMUM = "0.12.2"

# All of them provide the module `fairseq`, and pip does not know that they exclude each other.
FAIRSEQ_DISTRIBUTIONS = ("ve-fairseq", "fairseq-fixed", "fairseq")

INSTALL_FAIRSEQ = 'pip install "fairseq-deq[fairseq]" (in a checkout: pip install -e ".[fairseq]")'

# Files that the training, evaluation and generation tools cannot do without. A name without a suffix is a
# compiled module.
ESSENTIAL_FILES = (
    "__init__.py",
    "checkpoint_utils.py",
    "options.py",
    "sequence_generator.py",
    "sequence_scorer.py",
    "trainer.py",
    "utils.py",
    "data/data_utils.py",
    "data/data_utils_fast",
    "data/token_block_utils_fast",
    "distributed/utils.py",
    "modules/adaptive_softmax.py",
    "tasks/language_modeling.py",
)


def fairseq_is_installed() -> bool:
    """Say whether a module `fairseq` can be found, without importing it.

    Returns:
        True if there is one. A folder named fairseq without an `__init__.py` (a clone of its repository in
        the working directory) does not count.
    """
    if "fairseq" in sys.modules:
        return True
    spec = importlib.util.find_spec("fairseq")
    return spec is not None and spec.origin is not None


def require_torch() -> None:
    """Check that torch and numpy are there and new enough.

    Raises:
        ImportError: one of them is missing or too old; the sentence names it, both versions and what to
        type.
    """
    for package, minimum in (("torch", TORCH_MINIMUM), ("numpy", NUMPY_MINIMUM)):
        found = _version_of([package])
        if found is None and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"fairseq_deq needs {package} {minimum} or newer, and found none; type: pip install {package}"
            )
        if found is not None and _is_older(found[1], minimum):
            raise ImportError(
                f"fairseq_deq needs {package} {minimum} or newer, and found {package} {found[1]}; "
                f'type: pip install --upgrade "{package}>={minimum}"'
            )


def require_fairseq() -> None:
    """Check that a whole and new enough fairseq is installed.

    Raises:
        ImportError: fairseq is missing, too old, cannot be imported, or lacks files because another
        distribution
            of it was installed over it or removed from under it; the sentence says which and what to type.
    """
    require_torch()
    if not fairseq_is_installed():
        raise ImportError(
            f"fairseq_deq.models, .tasks and .criterions need fairseq {FAIRSEQ_MINIMUM} or newer, and found "
            f"none; type: {INSTALL_FAIRSEQ}"
        )
    _require_whole_fairseq()
    try:
        module = importlib.import_module("fairseq")
    except Exception as error:
        raise ImportError(_import_failure(error)) from error
    version = getattr(module, "__version__", None)
    if version is not None and _is_older(version, FAIRSEQ_MINIMUM):
        raise ImportError(
            f"fairseq_deq needs fairseq {FAIRSEQ_MINIMUM} or newer, and found {version} at "
            f"{Path(str(module.__file__)).parent}; type: {_reinstall_commands()}"
        )


def require_fairseq_or_exit() -> None:
    """The same for a command: it ends in the sentence alone.

    Raises:
        SystemExit: fairseq is missing or cannot be used.
    """
    try:
        require_fairseq()
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None


def _require_whole_fairseq() -> None:
    folder = _fairseq_folder()
    missing = _missing_files(folder)
    if not missing:
        return
    installed = _installed_fairseq()
    names = " and ".join(f"{name} {version}" for name, version in installed) or "no distribution"
    raise ImportError(
        f"the fairseq at {folder} is incomplete ({', '.join(missing)} missing; pip lists {names}): "
        f"{', '.join(FAIRSEQ_DISTRIBUTIONS)} overwrite and remove each other's files; "
        f"type: {_reinstall_commands()}"
    )


def _fairseq_folder() -> Path:
    module = sys.modules.get("fairseq")
    if module is not None and getattr(module, "__file__", None):
        return Path(str(module.__file__)).parent
    spec = importlib.util.find_spec("fairseq")
    assert spec is not None
    return Path(str(spec.origin)).parent


def _missing_files(folder: Path) -> list[str]:
    missing = []
    for name in ESSENTIAL_FILES:
        path = folder / name
        is_there = path.exists() if path.suffix else any(path.parent.glob(f"{path.name}.*"))
        if not is_there:
            missing.append(name)
    return missing


def _import_failure(error: Exception) -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    if isinstance(error, ValueError) and "mutable default" in str(error):
        found = " and ".join(f"{name} {version}" for name, version in _installed_fairseq()) or "this fairseq"
        return f"{found} cannot be imported on Python {python}; type: {_reinstall_commands()}"
    reason = f"{type(error).__name__}: {error}"
    return f"fairseq is installed but cannot be imported ({reason}); type: {_reinstall_commands()}"


def _reinstall_commands() -> str:
    # All providers have to go first: removing one of two takes away files of the other.
    installed = [name for name, _ in _installed_fairseq()]
    removal = f"pip uninstall -y {' '.join(installed)}; " if installed else ""
    return removal + INSTALL_FAIRSEQ


def _installed_fairseq() -> list[tuple[str, str]]:
    found = (_version_of([name]) for name in FAIRSEQ_DISTRIBUTIONS)
    return [item for item in found if item is not None]


def _version_of(distributions: Iterable[str]) -> tuple[str, str] | None:
    for name in distributions:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _is_older(version: str, minimum: str) -> bool:
    return _release(version) < _release(minimum)


def _release(version: str) -> tuple[int, ...]:
    # The numbers at the front are all that a minimum needs; "2.13.0+cpu" and "0.12.3a1" have them too.
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else (0,)
