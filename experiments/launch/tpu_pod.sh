#!/usr/bin/env bash
# A TPU pod slice: the same command on every worker, one process each, which find each other.
#
#     TPU=my-slice ZONE=us-central2-b experiments/launch/tpu_pod.sh --config=configs/e2e.py:medium \
#       --workdir=gs-mount/runs/e2e --config.mesh.data=4 --config.mesh.fsdp=8
#
# Every worker has this repository, with its environment (make quickstart, and `pip install -e .[tpu]`), in the folder
# FOLDER (lora_jax in the home folder unless said). The workdir lies where all workers see it: Filestore, or a bucket that
# is mounted with gcsfuse. On a slice of 32 chips data x fsdp x tensor is 32.
set -euo pipefail

: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"
folder=${FOLDER:-lora_jax}
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd $(printf %q "$folder") && .venv/bin/python -m experiments.train --distributed=auto $(printf '%q ' "$@")"
