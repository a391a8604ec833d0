#!/usr/bin/env bash
# Prunes a model on the GPUs of several SLURM nodes: one process a node, all of its GPUs. Arguments are those of
# `jprune prune`:
#
#   sbatch --nodes=2 scripts/slurm_prune.sh sparsegpt /shared/llama-70b --sparsity 0.5 --out /shared/pruned
#
# JAX finds the other processes from SLURM's variables (--distributed). The model, --out and the run folder beside it must
# lie where all nodes see them. With --resume, which goes on with a run that was interrupted and else begins one, a job
# that is requeued goes on; process 0 must then run on the node where it ran before, or docs/large-models.md says what
# to do about the lock.
#SBATCH --job-name=jprune
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# With one task a node JAX would take one GPU of it: say that all are this process's.
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-1} - 1)))

# When one process ends with an error, srun ends the others, and does not leave that to JAX.
exec srun --kill-on-bad-exit=1 "${PYTHON:-python3}" -m jprune prune "$@" --distributed --resume
