"""The tasks, registered with fairseq."""

import os

if "." not in __name__:  # --user-dir imports a folder under its own name
    raise ImportError(
        f"{os.path.dirname(__file__)} is a part of the package; type --user-dir "
        f"{os.path.dirname(os.path.dirname(__file__))}"
    )

from ..registration import register

register()

from . import copy_memory, deq_language_modeling, language_modeling, word_problem  # noqa: E402, F401
