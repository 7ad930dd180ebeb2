#!/usr/bin/env bash
# Quickstart's 200 steps in bf16 at EP 1 and 2, ZeRO 1 to 3, and in fp32: their final validation losses as a table.
# Needs the data that examples/quickstart.sh made. Usage: precision.sh OUT.md [section.field=value ...]
set -euo pipefail
out=$(realpath "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"

train() {  # precision ep stage
  local run=runs/precision/$1-ep$2-zero$3
  if [ ! -e "$run/summary.json" ]; then
    rm -rf "$run"
    port=$(python -c 'from megatron_tied.training.launcher import free_port; print(free_port())')
    deepspeed --quiet --num_accelerators 2 --master_port "$port" --module megatron_tied.pretrain \
      --config examples/quickstart.yaml "train.run_dir=$run" "train.precision=$1" \
      "parallel.expert_model_parallel_size=$2" "deepspeed.zero_optimization.stage=$3" \
      checkpoint.save_every=0 train.eval_every=200 train.eval_steps=32 "${overrides[@]}"
  fi
  python - "$run/summary.json" "$@" >> "$out" <<'PY'
import json, sys
summary = json.load(open(sys.argv[1]))
print("|", " | ".join([*sys.argv[2:], f"{summary['validation_loss']:.4f}", f"{summary['lm_loss']:.4f}"]), "|")
PY
}

overrides=("$@")
printf '| precision | EP | ZeRO | validation loss | training loss |\n|---|---|---|---|---|\n' > "$out"
train fp32 1 1
train fp32 2 1
for ep in 1 2; do
  for stage in 1 2 3; do
    train bf16 "$ep" "$stage"
  done
done
