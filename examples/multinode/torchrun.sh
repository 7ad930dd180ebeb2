#!/usr/bin/env bash
# On every host, at about the same time, without DeepSpeed's launcher:
# MASTER_ADDR=FIRST_HOST torchrun.sh NUMBER_OF_THIS_HOST HOSTS RANKS_PER_HOST CONFIG [section.field=value ...]
set -euo pipefail
: "${4:?usage: torchrun.sh NUMBER_OF_THIS_HOST HOSTS RANKS_PER_HOST CONFIG [section.field=value ...]}"
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$here/environment.sh"

number=$1 hosts=$2 ranks=$3 config=$4
shift 4

exec torchrun --nnodes "$hosts" --node-rank "$number" --nproc-per-node "$ranks" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  --module megatron_tied.pretrain --config "$config" "$@"
