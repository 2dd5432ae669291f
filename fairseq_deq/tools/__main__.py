"""The tools where they are not installed: `python -m fairseq_deq.tools NAME ...`."""

from __future__ import annotations

import sys

from .entry import DEVELOPMENT, TOOLS, run

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TOOLS | DEVELOPMENT:
        raise SystemExit(
            f"python -m fairseq_deq.tools NAME ...; NAME is one of {', '.join(TOOLS | DEVELOPMENT)}"
        )
    sys.exit(run(sys.argv[1], sys.argv[2:]))
