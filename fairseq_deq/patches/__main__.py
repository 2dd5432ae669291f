"""Prints the table of patches: `python -m fairseq_deq.patches`."""

from __future__ import annotations

import textwrap

from ..registration import register
from . import VARIABLE, install
from .sentences import one_sentence

_WIDTH = 110


def main() -> None:
    """Print every patch with its state, target, versions and fault."""
    register()
    states = install()
    for patch, state in states:
        print(f"{patch.name:20} {state:15} {patch.versions:18} {patch.target}")
        print(textwrap.fill(patch.fault, _WIDTH, initial_indent=" " * 21, subsequent_indent=" " * 21))
    active = sum(state == "active" for _, state in states)
    print(
        f"{active} of {len(states)} active; {VARIABLE}=off switches all of them off, "
        f"{VARIABLE}=name,name the named ones"
    )


if __name__ == "__main__":
    with one_sentence():
        main()
