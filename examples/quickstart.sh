#!/usr/bin/env bash
# From nothing to a trained model with tied experts: installs, makes a corpus and a tokenizer from this machine's own
# Python sources, trains 200 steps on two ranks, and says what came out. A second run reuses what is there,
# and goes on where a first one was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH"

work=runs/quickstart
data=$work/data/stdlib
run=$work/run
mkdir -p "$work/data"

if [ ! -e "$data.json" ]; then
  echo "Making a corpus of the Python standard library ..."
  mapfile -t sources < <(python - <<'PY'
import pathlib, sysconfig
root = pathlib.Path(sysconfig.get_path("stdlib"))
left_out = {"site-packages", "dist-packages", "test", "__pycache__", "idlelib", "lib2to3", "ensurepip"}
for path in sorted(root.iterdir()):
    if path.name not in left_out and (path.is_dir() or path.suffix == ".py"):
        if path.is_file() or any(path.rglob("*.py")):
            print(path)
PY
  )
  megatron-tied prepare-data --input "${sources[@]}" --output "$data" --train-tokenizer --vocab-size 4096
fi

if [ ! -e "$run/summary.json" ]; then
  overrides=()
  if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    ranks=$(python -c 'import torch; print(min(2, torch.cuda.device_count()))')
    overrides+=("train.precision=bf16" "parallel.expert_model_parallel_size=$ranks")
  else
    ranks=2
    export DS_ACCELERATOR=cpu  # the launcher would warn that it found no GPU
  fi
  echo "Training 200 steps on $ranks ranks ..."
  # A port that is free now: another job on this machine may hold the launcher's default.
  port=$(python -c 'from megatron_tied.training.launcher import free_port; print(free_port())')
  deepspeed --quiet --num_accelerators "$ranks" --master_port "$port" \
    --module megatron_tied.pretrain --config examples/quickstart.yaml "${overrides[@]}" "$@"
fi

python - "$run" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
s = json.loads((run / "summary.json").read_text())
p = s["parameters"]
print(f"""
Trained: {s['topology']}  (brackets: one expert bank)
  parameters       {p['unique']:,} stored; {p['untied']:,} if no layer shared ({p['untied'] / p['unique']:.2f}x)
  training loss    {s['lm_loss']:.3f}
  validation loss  {s['validation_loss']:.3f}
  speed            {s['tokens_per_second']:,.0f} tokens/s on {s['world_size']} ranks

  config   {run}/config.yaml
  metrics  {run}/metrics.jsonl
  summary  {run}/summary.json
  curves   .venv/bin/tensorboard --logdir {run}/tensorboard
  text     .venv/bin/megatron-tied generate --checkpoint {run} --prompt 'def '

What to try next: "The first hour" in README.md""")
PY
