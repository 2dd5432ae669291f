"""The table of patches: every fault of fairseq that no method of this package can override."""

from __future__ import annotations

from .table_of_files import READING
from .table_of_runs import RUNNING

# If several replace the same function, a later one wraps the earlier ones.
TABLE = (*READING, *RUNNING)
