#!/usr/bin/env bash
# Trains on one node or many, on GPUs or CPUs; the words after the script go to fer_dist.train:
#
#   sbatch slurm/train.sh
#   sbatch --nodes=4 slurm/train.sh --config vit --data /data/fer2013.zip
#   sbatch --gpus-per-node=0 --cpus-per-task=2 slurm/train.sh --config demo          # CPUs: a rank for each core
#
# Any of the lines below is changed by the same word in front of the script.
#SBATCH --job-name=fer_dist
#SBATCH --nodes=1                # how many machines
#SBATCH --ntasks-per-node=1      # one torchrun on each; leave it: it starts the ranks
#SBATCH --gpus-per-node=4        # ranks on each node; 0: none, a rank for each core instead
#SBATCH --cpus-per-task=8        # cores of each node, shared by its ranks
#SBATCH --time=1-00:00:00        # the trainer goes on after it, see --requeue
#SBATCH --signal=B:USR1@180      # this many seconds before the limit: save and requeue. Keep the B: (to this script)
#SBATCH --requeue                # may be started again: by us, after preemption, after the loss of a node
#SBATCH --open-mode=append       # ... and then writes on in the same log
#SBATCH --output=%x-%j.log
set -uo pipefail
for FER_SLURM in "${FER_SLURM:-.}" "$(dirname "${BASH_SOURCE[0]}")" "$PWD/slurm" "${SLURM_SUBMIT_DIR:-.}/slurm"; do
  [ ! -r "$FER_SLURM/lib.sh" ] || break
done
[ -r "$FER_SLURM/lib.sh" ] ||
  { echo "error: no lib.sh; submit from the repository, or export FER_SLURM=.../slurm" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
. "$FER_SLURM/lib.sh"

# What a node runs. Its ranks: FER_RANKS_PER_NODE, or a rank a GPU, or a rank a core. exec, so that torchrun is what
# SLURM signals; it tells the ranks, and waits for their saving longer than the 30 s that it would by itself. It is
# torchrun as fer_dist.launch starts it: with an exit code that tells a run that was stopped from one that crashed.
# shellcheck disable=SC2016
ON_NODE='
ranks=${FER_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
[ "$ranks" -gt 0 ] || ranks=$cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
exec "${@:2:$1}" -m fer_dist.launch --nnodes="$SLURM_NNODES" --nproc_per_node="$ranks" \
  --rdzv-backend=c10d --rdzv-endpoint="$FER_RENDEZVOUS" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=600 \
  -m fer_dist.train "${@:$1+2}"'

# A port for the job alone: below those that Linux hands out itself, and another one than Ray gets in tune.sh.
FER_RENDEZVOUS=$(first_node):$((29000 + SLURM_JOB_ID % 3000))
export FER_RENDEZVOUS
say "job $SLURM_JOB_ID, start $((RESTARTS + 1)): $NODES nodes (${SLURM_JOB_NODELIST:-}), rendezvous $FER_RENDEZVOUS"
words=("${WITHIN[@]}" "$PYTHON")
require_words fer_dist.train "$@" # and not by every rank
# A node that ends first, with a bad exit or not, must not end the others while they save.
await srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=660 "${SRUN_WORDS[@]}" \
  bash -c "$ON_NODE" fer_dist "${#words[@]}" "${words[@]}" "$@"
finish $?
