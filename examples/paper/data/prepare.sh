#!/usr/bin/env bash
# The paper's mixture, DCLM-edu 75 : FinePhrase 25 in cl100k_base tokens, streamed from the Hugging Face hub. Started
# again after an interruption it goes on where it was; what is finished is left alone.
#   examples/paper/data/prepare.sh [DIRECTORY [STEPS]]        STEPS: 20000, or 30000 for the 7B models
set -euo pipefail

out=${1:-data/paper}
steps=${2:-20000}
held_out_rows=${HELD_OUT_ROWS:-20000}
# FinePhrase has the rephrased texts under rollout_results.text; under text, which the paper's code reads, the originals.
finephrase_text=${FINEPHRASE_TEXT:-text}
# Commits on the hub. With none, the newest: an interrupted run then does not go on after a change there.
dclm_revision=${DCLM_REVISION:-}
finephrase_revision=${FINEPHRASE_REVISION:-}

batch=524288
# One per cent more than is trained on, so that a blend, which draws a little more than its share, repeats nothing.
tokens() { echo $((steps * batch * $1 / 100 * 101 / 100)); }

prepare() { # NAME PART OPTIONS: PART of a data set, as NAME-PART
  local prefix=$out/$1-$2
  shift 2
  [[ -e $prefix.json ]] && echo "$prefix is there" && return
  megatron-tied prepare-data --output "$prefix" --tokenizer "${TOKENIZER:-tiktoken:cl100k_base}" --separator before \
    --shuffle-files 42 ${WORKERS:+--workers "$WORKERS"} "$@"
}

check() { # NAME TOKENS: both parts are of the same files, in the same order, and what is there was made for as many tokens
  python - "$out/$1" "$2" <<'PY'
import json, sys
prefix, wanted = sys.argv[1], int(sys.argv[2])
held_out, train = (json.load(open(f"{prefix}-{part}.json"))["source"] for part in ("held-out", "train"))
if train["max_tokens"] < wanted:
    sys.exit(f"{prefix}-train was made for {train['max_tokens']:,} tokens, and {wanted:,} are wanted: remove it, or "
             "give another DIRECTORY")
if held_out["files_sha256"] != train["files_sha256"]:
    sys.exit(f"{prefix}-held-out and {prefix}-train were made from other files, by which held-out rows may be trained "
             "on: remove both, and fix the revision")
PY
}

both() { # NAME SHARE OPTIONS: the held-out rows come first in the order of the files, those for training after them
  local name=$1 share=$2
  shift 2
  prepare "$name" held-out --max-rows "$held_out_rows" "$@"
  prepare "$name" train --skip-rows "$held_out_rows" --max-tokens "$(tokens "$share")" "$@"
  check "$name" "$(tokens "$share")"
}

mkdir -p "$out"
both dclm-edu 75 --dataset "${DCLM:-HuggingFaceTB/dclm-edu}" \
  ${dclm_revision:+--dataset-revision "$dclm_revision"}
both finephrase 25 --dataset "${FINEPHRASE:-HuggingFaceFW/finephrase}" --dataset-config "${FINEPHRASE_CONFIG:-all}" \
  --text-key "$finephrase_text" ${finephrase_revision:+--dataset-revision "$finephrase_revision"}
