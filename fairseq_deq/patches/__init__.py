"""Patches for faults of fairseq on today's torch and numpy: a table of them, and `install`, which applies it.

`python -m fairseq_deq.patches` prints the table with the state of each patch. The environment variable
`FAIRSEQ_DEQ_PATCHES` switches patches off: `off` all of them, or some by name, with commas between. A patch
is for a fault that no subclass can correct. All other corrections are in this package's tasks, criterions and
models.
"""

from __future__ import annotations

import logging
import os

from ..errors import OptionError
from ._patch import Patch
from .table import TABLE

logger = logging.getLogger(__name__)

VARIABLE = "FAIRSEQ_DEQ_PATCHES"

_states: list[tuple[Patch, str]] = []


def install() -> list[tuple[Patch, str]]:
    """Apply every patch that is not switched off; a second call changes nothing.

    Returns:
        the patches, each with its state: `active`, `not needed`, `switched off` or `target is gone`.
    Raises:
        OptionError: the environment variable names a patch that does not exist.
    """
    if _states:  # a fault that is patched can no longer be detected
        return _states
    off = switched_off()
    _states.extend((patch, "switched off" if patch.name in off else patch.apply()) for patch in TABLE)
    for patch, state in _states:
        if state == "target is gone":
            logger.warning(
                "this fairseq has no %s, which the patch %r replaces: check whether its fault is "
                "gone too (%s)",
                patch.target,
                patch.name,
                patch.fault,
            )
    return _states


def switched_off() -> set[str]:
    """The names of the patches that the environment variable switches off.

    Raises:
        OptionError: it names a patch that does not exist.
    """
    text = os.environ.get(VARIABLE, "").strip()
    known = {patch.name for patch in TABLE}
    if text == "off":
        return known
    names = {name.strip() for name in text.split(",") if name.strip()}
    unknown = sorted(names - known)
    if unknown:
        raise OptionError(
            f"{VARIABLE} names {unknown[0]!r}, which is no patch; give off, or some of these names, "
            f"with commas between: {', '.join(sorted(known))}"
        )
    return names
