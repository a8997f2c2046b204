#!/usr/bin/env bash
# Exports checkpoints, a part of them in each task of an array; words after -- go to the export of each:
#
#   sbatch slurm/export.sh runs/small/best.pth
#   sbatch --array=0-3 slurm/export.sh runs/*/best.pth -- --precision fp16
#   FER_EXPORT=export.onnx sbatch --array=0-3 --gpus-per-node=0 slurm/export.sh runs/*/best.pth   # no engines: no GPU
#
# A task takes every n-th checkpoint of an array of n, so that an array of any size goes through all of them.
#SBATCH --job-name=fer_export
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1        # TensorRT builds and executes on it; 0: a portable engine of TensorRT for RTX
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --requeue                # an export leaves its files whole or not at all: doing it again is harmless
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -uo pipefail
for FER_SLURM in "${FER_SLURM:-.}" "$(dirname "${BASH_SOURCE[0]}")" "$PWD/slurm" "${SLURM_SUBMIT_DIR:-.}/slurm"; do
  [ ! -r "$FER_SLURM/lib.sh" ] || break
done
[ -r "$FER_SLURM/lib.sh" ] ||
  { echo "error: no lib.sh; submit from the repository, or export FER_SLURM=.../slurm" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
. "$FER_SLURM/lib.sh"
require_node

checkpoints=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  checkpoints+=("$1")
  shift
done
[ $# = 0 ] || shift # the --
[ ${#checkpoints[@]} -gt 0 ] || fail "no checkpoint is named" "sbatch slurm/export.sh runs/small/best.pth"

step=${SLURM_ARRAY_TASK_STEP:-1}
every=${SLURM_ARRAY_TASK_COUNT:-1}
first=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / step))
[ $(((${SLURM_ARRAY_TASK_MAX:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / step + 1)) = "$every" ] ||
  fail "the array has gaps: $every tasks of ${SLURM_ARRAY_TASK_MIN:-} to ${SLURM_ARRAY_TASK_MAX:-}" "sbatch --array=0-3"
[ "$first" -lt ${#checkpoints[@]} ] || say "${#checkpoints[@]} checkpoints, $every tasks: nothing to do here"
passed_on=TERM
first_error=0
for ((i = first; i < ${#checkpoints[@]}; i += every)); do
  say "export of ${checkpoints[i]}"
  status=0
  await "${WITHIN[@]}" "$PYTHON" -m "${FER_EXPORT:-export.trt}" "${checkpoints[i]}" "$@" || status=$?
  [ -z "$asked" ] || finish "$STOPPED"
  [ "$status" = 0 ] || say "${checkpoints[i]}: exit code $status; the others go on"
  [ "$first_error" != 0 ] || first_error=$status
done
finish "$first_error"
