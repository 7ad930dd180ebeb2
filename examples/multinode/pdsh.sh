#!/usr/bin/env bash
# From one host, by pdsh: pdsh.sh HOSTFILE CONFIG [section.field=value ...]
# Variables for the ranks go into .deepspeed_env, see deepspeed_env.
set -euo pipefail
: "${2:?usage: pdsh.sh HOSTFILE CONFIG [section.field=value ...]}"

hostfile=$1 config=$2
shift 2

exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
  --module megatron_tied.pretrain --config "$config" "$@"
