#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest. No GPU needed; slow and GPU tests: -m "slow or gpu".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_venv.sh test
# TensorBoard's pages and HTML reports are looked at in a browser; without one those tests are skipped.
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing Chromium for the browser tests ..."
  { timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y --no-install-recommends \
    chromium chromium-driver fonts-dejavu-core; } >/dev/null 2>&1 || echo "no Chromium: browser tests are skipped"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
marker=(-m "not slow and not gpu")
[ $# -eq 0 ] || marker=()
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec .venv/bin/python -m pytest "${marker[@]}" "$@"
