#!/usr/bin/env bash
# Prunes a model on all hosts of a Cloud TPU slice. Arguments are those of `jprune prune`:
#
#   TPU=my-slice ZONE=us-east5-a scripts/tpu_pod_prune.sh \
#     sparsegpt /mnt/shared/llama-70b --sparsity 0.5 --out /mnt/shared/pruned
#
# Runs here, with gcloud, and starts the same command on every host of the slice, where jprune[tpu] must be installed;
# JAX finds the other hosts itself (--distributed). The model, --out and the run folder beside it must lie where all hosts
# see them: a Filestore share that is mounted everywhere, say. Given again after a preemption, it goes on (--resume).
set -euo pipefail

if [[ $# -eq 0 || -z ${TPU:-} || -z ${ZONE:-} ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

command=$(printf '%q ' "${PYTHON:-python3}" -m jprune prune "$@" --distributed --resume)
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
