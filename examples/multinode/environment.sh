# Sourced by what runs on every host; a variable that is set already stays. For pdsh.sh the file deepspeed_env does this.
# shellcheck shell=bash

# The interface that carries the traffic between hosts, as `ip -brief address` names it, such as eth0 or ib0.
if [ -n "${NIC:-}" ]; then
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$NIC}"
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NIC}"
fi

# Minutes that ranks wait for each other at the start, and then in a collective of all ranks.
export DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-10}"
# Seconds until a rank is aborted whose NCCL is stuck for good.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-480}"

# Where ranks meet: a port of the first host that is free there and open between the hosts.
export MASTER_PORT="${MASTER_PORT:-29500}"
