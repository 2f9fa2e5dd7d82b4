#!/usr/bin/env bash
# Trains on several hosts: run the same command on each, with HOST_RANK from 0 on and the address of host 0.
#   HOSTS=2 HOST_RANK=0 HOST_ZERO=10.0.0.1 configs/launch/several_hosts.sh CONFIG [key=value ...]
set -euo pipefail

config=${1:?usage: several_hosts.sh CONFIG [key=value ...]}
shift
hosts=${HOSTS:?number of hosts}
rank=${HOST_RANK:?this host, from 0}
zero=${HOST_ZERO:?address of host 0, as the others reach it}

# where a host has several networks, say which one carries the traffic
if [[ -n ${NETWORK:-} ]]; then
  export NCCL_SOCKET_IFNAME=$NETWORK GLOO_SOCKET_IFNAME=$NETWORK
fi

# a host that fails ends its torchrun; whoever started it starts it again, and the job continues
while true; do
  code=0
  torchrun \
    --nnodes "$hosts" \
    --node-rank "$rank" \
    --nproc-per-node "${RANKS:-gpu}" \
    --master-addr "$zero" \
    --master-port "${PORT:-29500}" \
    --max-restarts 0 \
    --no-python \
    assay train "$config" "$@" &
  child=$!
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  wait "$child" || code=$?
  if [[ -n ${stopped:-} ]]; then
    # wait returned because of the signal; the checkpoint is written until torchrun ends
    wait "$child" || true
    exit 143
  fi
  if ((code == 0)); then
    exit 0
  fi
  starts=$((${starts:-0} + 1))
  if ((starts >= ${RESTARTS:-20})); then
    exit "$code"
  fi
  echo "host $rank: ended with $code, start $((starts + 1))" >&2
  sleep 5
done
