#!/usr/bin/env bash
# Sets up .venv, then runs every gate and test, two files at a time; with arguments, pytest with these, one by one.
# On the CPU, whatever GPUs there are; slow tests: -m slow. Where it is root, it also installs what some tests need,
# from Debian; without it those tests are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_venv.sh test

packages=()
needs() {  # PROGRAM PACKAGE...: the packages, where the program is not there
  PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || packages+=("${@:2}")
}
needs chromedriver chromium chromium-driver fonts-dejavu-core  # TensorBoard's pages and HTML reports
needs ip iproute2; needs sshd openssh-server; needs pdsh pdsh; needs numactl numactl; needs hostname hostname  # a cluster
needs shellcheck shellcheck; needs faketime faketime  # the latter brings libfaketime.so, for a skewed clock
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing ${packages[*]} for the tests ..."
  # No server of theirs is to start: the tests start their own, in namespaces.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  { timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y \
    --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 || echo "not installed: what needs them is skipped"
  # Not left to the trap: what replaces this shell runs none.
  [ -z "$(trap -p EXIT)" ] || rm -f "$policy"
  trap - EXIT
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_VISIBLE_DEVICES=
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"
.venv/bin/mypy
.venv/bin/lint-imports --no-cache --no-logo
# Two ranks rarely keep two cores busy. What the tests' own processes run is measured, not what ranks do.
.venv/bin/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile --durations 15 \
  --cov megatron_tied --cov-report term:skip-covered
