#!/usr/bin/env bash
# From one host, by ssh alone: ssh.sh HOSTFILE CONFIG [section.field=value ...]
# The deepspeed launcher knows pdsh, MPI and SLURM, not plain ssh: this runs no_ssh.sh on every host of the hostfile, in
# this directory, with this PATH. When it fails on one, or this script is told to end, it ends the launchers on all.
set -euo pipefail
: "${2:?usage: ssh.sh HOSTFILE CONFIG [section.field=value ...]}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$here/environment.sh"

hostfile=$1
mapfile -t hosts < <(awk '/slots=/ && !/^ *#/ { print $1 }' "$hostfile")
if [ "${#hosts[@]}" = 0 ]; then
  echo "error: no host in $hostfile; a line for each, such as: node0 slots=8" >&2
  exit 2
fi

end_all() {
  trap '' TERM INT HUP
  local host
  for host in "${hosts[@]}"; do
    # The brackets: the pattern matches the launcher, and not the shell that runs this.
    ssh -o BatchMode=yes -o ConnectTimeout=10 -- "$host" \
      "pkill -TERM -f '[d]eepspeed.launcher.launch .*--master_port=$MASTER_PORT '" </dev/null &
  done
  wait
}
trap 'end_all; exit 143' TERM INT HUP

sent=(PATH="$PATH")
for name in NIC NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME DEEPSPEED_TIMEOUT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC \
  MASTER_ADDR MASTER_PORT DS_ACCELERATOR OMP_NUM_THREADS; do
  [ -z "${!name:-}" ] || sent+=("$name=${!name}")
done
for number in "${!hosts[@]}"; do
  command=(env "${sent[@]}" bash "$here/no_ssh.sh" "$number" "$@")
  # Without keepalives ssh would wait for hours for a host that has no power.
  ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -- "${hosts[$number]}" \
    "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")" </dev/null &
done

for _ in "${hosts[@]}"; do
  code=0
  wait -n || code=$?
  if [ "$code" != 0 ]; then
    end_all
    exit "$code"
  fi
done
