# shellcheck shell=bash disable=SC2034
# What the three scripts share: the setup of a site, waiting for a step, and the decision to requeue.
#
# Hooks, all of them variables of the environment; each may stay unset:
#   FER_SETUP          a file that is sourced first: modules, a virtual environment, NCCL_SOCKET_IFNAME
#   FER_PYTHON         the interpreter; default: .venv/bin/python where there is one, else python
#   FER_SRUN           more words for srun, e.g. the --container-image of Pyxis
#   FER_WITHIN         words before the interpreter, e.g. "apptainer exec --nv fer.sif"
#   FER_MAX_REQUEUES   how often a job may be requeued, whatever the reason; default: 20

REQUEUE_CODE=75 # of a job that wants to be started again but cannot say so: RequeueExit=75 in slurm.conf
export SLURM_EXPORT_ENV=ALL # sbatch --export=NONE would let srun lose PATH and all the rest, too

say() { printf '%s %s\n' "$(date +%Y-%m-%dT%H:%M:%S%z)" "$*"; }
fail() { # fail PROBLEM FIX: an error of the user
  printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is not a job of SLURM" "sbatch $0, or within salloc"
if [ -n "${FER_SETUP:-}" ]; then
  [ -r "$FER_SETUP" ] || fail "FER_SETUP names $FER_SETUP, which cannot be read" "unset FER_SETUP, or put it right"
  # shellcheck disable=SC1090
  . "$FER_SETUP"
fi
PYTHON=${FER_PYTHON:-python}
[ -n "${FER_PYTHON:-}" ] || [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
[[ ${FER_MAX_REQUEUES:=20} =~ ^[0-9]+$ ]] || fail "FER_MAX_REQUEUES is '$FER_MAX_REQUEUES', expected a number" \
  "export FER_MAX_REQUEUES=20"
read -ra SRUN_WORDS <<<"${FER_SRUN:-}"
read -ra WITHIN <<<"${FER_WITHIN:-}"
RESTARTS=${SLURM_RESTART_COUNT:-0}
NODES=${SLURM_JOB_NUM_NODES:-1}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it by itself

control() { command -v scontrol >/dev/null && scontrol "$@" 2>&1; }

first_node() { # the address of the first node, as SLURM itself reaches it
  local name=${SLURMD_NODENAME:-$(hostname)} address
  name=$(control show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1) || name=$(hostname)
  address=$(control show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
  printf '%s\n' "${address:-$name}"
}

# -- signals: USR1 comes before the time limit (#SBATCH --signal=B:USR1@...), TERM with preemption, requeue and scancel

asked=''  # the signal that has come
child=''  # the process that is waited for
passed_on=USR1 # what it is told; srun hands USR1 to its tasks, but would end them at once at a TERM

note() {
  asked=${asked:-$1}
  [ -z "$child" ] || kill -s "$passed_on" "$child" 2>/dev/null || true
}
trap 'note USR1' USR1
trap 'note TERM' TERM

await() { # await COMMAND...: its exit status, however often a signal interrupts the waiting
  local status=0
  "$@" &
  child=$!
  [ -z "$asked" ] || kill -s "$passed_on" "$child" 2>/dev/null || true
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  wait "$child" 2>/dev/null || status=$? # the first one may have been that of the trap
  child=''
  return "$status"
}

all_nodes_answer() { # whether each node of the allocation runs a command
  timeout -k 5 60 srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --gres=none true >/dev/null 2>&1
}

finish() { # finish STATUS: leave, and see to it that a job that is not done comes again; a crash does not
  local status=$1 why='' state
  [ "$status" != 0 ] || exit 0
  if [ -n "$asked" ]; then
    why="told to stop ($asked)"
  elif [ "$NODES" -gt 1 ] && ! all_nodes_answer; then
    why="a node does not answer"
  else
    say "ended with $status, not told to stop: not requeued"
    exit "$status"
  fi
  if [ "$RESTARTS" -ge "$FER_MAX_REQUEUES" ]; then
    say "$why, but requeued $RESTARTS times already (FER_MAX_REQUEUES=$FER_MAX_REQUEUES): not requeued"
    exit "$status"
  fi
  state=$(control show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1) || true
  if [ -n "$state" ] && [ "$state" != RUNNING ]; then
    say "$why, and SLURM ends the job itself ($state)" # scancel; or preemption and scontrol requeue, after which it comes again
    exit "$REQUEUE_CODE"
  fi
  say "$why: requeued, start $((RESTARTS + 2))"
  ! control requeue "$SLURM_JOB_ID" || exit 0 # SLURM ends this script now
  say "scontrol cannot requeue: exit code $REQUEUE_CODE (RequeueExit=$REQUEUE_CODE in slurm.conf starts it again)"
  exit "$REQUEUE_CODE"
}
