#!/usr/bin/env bash
# On every host, at about the same time, by whatever starts programs there:
# no_ssh.sh NUMBER_OF_THIS_HOST HOSTFILE CONFIG [section.field=value ...]
# Hosts are numbered from 0, in the order of the hostfile.
set -euo pipefail
: "${3:?usage: no_ssh.sh NUMBER_OF_THIS_HOST HOSTFILE CONFIG [section.field=value ...]}"
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$here/environment.sh"

number=$1 hostfile=$2 config=$3
shift 3
first=$(awk '/slots=/ && !/^ *#/ { print $1; exit }' "$hostfile")

exec deepspeed --no_ssh --node_rank "$number" --hostfile "$hostfile" \
  --master_addr "${MASTER_ADDR:-$first}" --master_port "$MASTER_PORT" \
  --module megatron_tied.pretrain --config "$config" "$@"
