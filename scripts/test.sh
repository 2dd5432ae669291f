#!/usr/bin/env bash
# Checks the format, the lint, the types and the tests. Arguments go to pytest: `bash scripts/test.sh -k solvers`,
# `bash scripts/test.sh -m slow` for those that take minutes. WORKERS=1 runs the tests one after another.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
# Small tensors: more threads than one only wait for each other.
export OMP_NUM_THREADS=1

ruff format --check .
ruff check .
mypy
# Two workers, each with folders of its own; a file's tests stay together, as they share what they trained.
pytest -q -n "${WORKERS:-2}" --dist loadfile -m "not slow" "$@"
