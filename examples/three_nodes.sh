#!/bin/bash
# A Ray cluster of three nodes on this machine, with token authentication: two runs are submitted, the second waits for
# the first, and the result of both is fetched. Run it from the checkout after `make demo`. docs/clusters.md shows it.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # a job runs the `python` on PATH of the head
work=$(mktemp -d -t rays-XXXX)
export RAY_TMPDIR=$work RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
export QLORA_LEDGER=$work/ledger.sqlite
nodes=()
trap 'kill "${nodes[@]}" 2>/dev/null; wait; rm -rf "$work"' EXIT

show() {
  printf '$ %s\n' "$*"
  "$@" | cut -c -150 || true
}

(umask 077 && head -c 32 /dev/urandom | base64 | tr -dc a-zA-Z0-9 >"$RAY_AUTH_TOKEN_PATH")
start() {
  ray start --disable-usage-stats --block "$@" >"$work/$RANDOM.log" 2>&1 &
  nodes+=($!)
}
alive() { until [ "$(ray list nodes --address "$RAY_API_SERVER_ADDRESS" 2>/dev/null | grep -c ALIVE)" = "$1" ]; do sleep 1; done; }

# the head has no workers; a node that is a machine of its own needs no --node-ip-address
start --head --port=6399 --num-cpus=0 --dashboard-port=8265
until [ -e "$work/ray/ray_current_cluster" ]; do sleep 1; done
# one after the other: two that start on one machine at once may get in each other's way
start --address=127.0.0.1:6399 --node-ip-address=127.0.0.2 --num-cpus=1
alive 2
start --address=127.0.0.1:6399 --node-ip-address=127.0.0.3 --num-cpus=1
alive 3

submit() { printf '$ qlora-submit %s\n' "$*" && qlora-submit "$@" 2>/dev/null | tail -n 2; }
submit examples/demo.yaml name=first "output=$work/runs/first"
sleep 15
submit examples/demo.yaml name=second "output=$work/runs/second" recipe.learning_rate=1e-3
first=$(qlora-submit list | awk '/^ ?first-/ {print $1}')
second=$(qlora-submit list | awk '/^ ?second-/ {print $1}')
until qlora-submit status "$second" | grep -q '^waits.*waiting for .* at once'; do sleep 1; done
show qlora-submit list
show qlora-submit status "$first"
show qlora-submit status "$second"
show qlora-submit wait "$first"
show qlora-submit wait "$second"
show qlora-submit list
show qlora-submit result "$second" --to "$work/mine"
show qlora-capacity ledger
