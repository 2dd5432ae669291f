"""Programs that begin as in a new process, without the 4 seconds for its imports of torch and fairseq."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from conftest import Output

# Imports, then forks for each program; multiprocessing ends a fork with the status that Python would.
FORKING = """
import json, multiprocessing, os, sys

def run(program, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    exec(program, {"__name__": "__main__"})

imports, programs = json.load(sys.stdin)
exec(imports)
statuses = []
for task in programs:
    fork = multiprocessing.get_context("fork").Process(target=run, args=task)
    fork.start()
    fork.join()
    statuses.append(fork.exitcode)
print(json.dumps(statuses))
"""

# What takes most of the time of importing fairseq; some versions do without the second.
IMPORTED_BY_FAIRSEQ = """
import contextlib, torch
with contextlib.suppress(ImportError):
    import sklearn.metrics
"""


def run_forked(imports: str, programs: Sequence[str]) -> list[Output]:
    """Run programs one after another, each in a fork of one new process.

    Args:
        imports: what the process runs before it forks.
        programs: Python code.

    Returns:
        What each printed on both streams, and its status.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(i) for i in range(len(programs))]
        done = subprocess.run(
            [sys.executable, "-c", FORKING],
            input=json.dumps([imports, [[p, str(log)] for p, log in zip(programs, logs)]]),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
        statuses = json.loads(done.stdout)
        return [Output(log.read_text(), status) for log, status in zip(logs, statuses)]
