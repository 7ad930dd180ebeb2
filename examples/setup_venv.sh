#!/usr/bin/env bash
# Makes .venv at the top of the checkout and installs the package in it: `setup_venv.sh [EXTRA]`. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:+[$1]}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed (set PYTHON=/path/to/python)" >&2
  exit 2
}
[ -x .venv/bin/pip ] || "$python" -m venv .venv  # again, where a first time was cut off
stamp=.venv/installed${1:+-$1}
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "Installing into .venv (a few minutes the first time) ..."
  # torch first, so that nothing below pulls another build of it. A host with GPUs gets the newest CUDA build.
  if command -v nvidia-smi >/dev/null; then torch="torch>=2.10"; else torch="torch==2.13.0"; fi
  .venv/bin/pip install --quiet --disable-pip-version-check "${TORCH:-$torch}"
  .venv/bin/pip install --quiet --disable-pip-version-check --editable ".$extra"
  touch "$stamp"
fi
