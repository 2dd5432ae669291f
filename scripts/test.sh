#!/usr/bin/env bash
# Checks the format, the lint, the types and the tests. Arguments go to pytest: `bash scripts/test.sh -k solvers`,
# `bash scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
# Small tensors: more threads than one only wait for each other.
export OMP_NUM_THREADS=1

ruff format --check .
ruff check .
mypy
pytest -q -m "not slow" "$@"
