#!/usr/bin/env bash
# `megatron-tied bench` on a host without GPUs: quickstart and an OLMoE-shaped model, 1 and 2 ranks, fp32 and bf16.
# Usage: speed.sh OUT.md. It takes twenty minutes on two cores, which should have nothing else to do.
set -euo pipefail
out=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH" COLUMNS=160

bench() {
  {
    printf '\n```\n$ megatron-tied bench %s\n' "$*"
    megatron-tied bench "$@"
    printf '```\n'
  } >> "$out"
}

shape=(--config examples/benchmarks/olmoe_shape.yaml --steps 1 --rounds 8 --no-memory)
bf16=(train.precision=bf16 deepspeed.zero_optimization.stage=1)
few=(train.seq_length=256 train.micro_batch_size=1 train.global_batch_size=2)
two=(parallel.expert_model_parallel_size=2 train.global_batch_size=8)
: > "$out"
bench "${shape[@]}" --against untied,huggingface
bench "${shape[@]}" --against untied,huggingface "${bf16[@]}"
bench --ranks 2 --no-memory
for stage in 2 3; do
  bench --ranks 2 --no-memory parallel.expert_model_parallel_size=1 deepspeed.zero_optimization.stage=$stage
done
bench "${shape[@]}" --ranks 2 "${two[@]}"
bench "${shape[@]}" --ranks 2 "${two[@]}" "${bf16[@]}"
bench "${shape[@]}" --ranks 2 "${two[@]}" "${few[@]}"
