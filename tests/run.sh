#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest. No GPU needed; slow and GPU tests: -m "slow or gpu".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_venv.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
marker=(-m "not slow and not gpu")
[ $# -eq 0 ] || marker=()
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec .venv/bin/python -m pytest "${marker[@]}" "$@"
