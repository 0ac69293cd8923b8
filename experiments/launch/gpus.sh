#!/usr/bin/env bash
# One machine, all its GPUs, one process.
#
#     experiments/launch/gpus.sh --config=configs/e2e.py:medium --workdir=runs/e2e
#
# The batch is spread over all GPUs (mesh.data); another mesh can be given after it, as docs/how_to/devices.md says. The
# first process to use a GPU takes three quarters of its memory: JAX's default, which XLA_PYTHON_CLIENT_MEM_FRACTION
# changes.
set -euo pipefail

python=${PYTHON:-python}
count=$($python -c 'import jax; print(jax.local_device_count("gpu"))')
exec "$python" -m experiments.train --config.mesh.data="$count" "$@"
