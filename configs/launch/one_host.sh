#!/usr/bin/env bash
# Trains on all GPUs of this host (or RANKS processes), and starts all of them anew when one dies.
#   configs/launch/one_host.sh CONFIG [key=value ...]
set -euo pipefail

config=${1:?usage: one_host.sh CONFIG [key=value ...]}
shift
ranks=${RANKS:-gpu}

# exec: a SIGTERM to this script is one to torchrun, which passes it on
exec torchrun \
  --standalone \
  --nproc-per-node "$ranks" \
  --max-restarts "${RESTARTS:-20}" \
  --no-python \
  assay train "$config" "$@"
