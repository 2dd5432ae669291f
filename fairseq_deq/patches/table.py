"""The table of patches: every fault of fairseq that no method of ours can override."""

from __future__ import annotations

from .table_of_files import READING
from .table_of_runs import RUNNING

# Where several replace the same function, a later one is the outer one.
TABLE = (*READING, *RUNNING)
