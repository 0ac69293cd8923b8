#!/usr/bin/env bash
# One run of several processes on one machine: to try what a pod would do, on CPU devices.
#
#     experiments/launch/local.sh 2 4 -m experiments.train --config=configs/e2e.py:small --workdir=runs/two \
#       --config.mesh.data=8
#
# starts two processes of four CPU devices each. SIGTERM and Ctrl-C go on to both; the status is that of the first one
# that fails.
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: $0 PROCESSES DEVICES_EACH -m experiments.train --config=..." >&2; exit 2; }
processes=$1 devices=$2
shift 2
python=${PYTHON:-python}
port=$($python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=$devices

started=()
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  "$python" "$@" --coordinator="127.0.0.1:$port" --processes="$processes" --process="$i" &
  started+=($!)
done

status=0
for process in "${started[@]}"; do
  # wait returns at a signal too: again, until the process has ended
  while :; do
    code=0
    wait "$process" || code=$?
    kill -0 "$process" 2>/dev/null || break
  done
  [ "$status" -ne 0 ] || status=$code
done
exit "$status"
