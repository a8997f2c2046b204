# shellcheck shell=bash disable=SC2034
# What the three scripts share: the setup of a site, waiting for a step, and the decision to requeue.
#
# Hooks, all of them variables of the environment; each may stay unset:
#   FER_SETUP          a file that is sourced first: modules, a virtual environment, NCCL_SOCKET_IFNAME
#   FER_PYTHON         the interpreter; default: that of a virtual environment of FER_SETUP,
#                      .venv/bin/python where there is one, or beside slurm/, else python
#   FER_SRUN           more words for srun, e.g. the --container-image of Pyxis
#   FER_WITHIN         words before the interpreter, e.g. "apptainer exec --nv fer.sif"
#   FER_MAX_REQUEUES   how often a job may be requeued, whatever the reason; default: 50

STOPPED=75 # exit code of a run that was told to stop and has saved; RequeueExit=75 in slurm.conf starts it again
export SLURM_EXPORT_ENV=ALL # sbatch --export=NONE would let srun lose PATH and all the rest, too

say() { printf '%s %s\n' "$(date +%Y-%m-%dT%H:%M:%S%z)" "$*"; }
fail() { # fail PROBLEM FIX: an error of the user
  printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is not a job of SLURM" "sbatch $0, or within salloc"
if [ -n "${FER_SETUP:-}" ]; then
  [ -r "$FER_SETUP" ] || fail "FER_SETUP names $FER_SETUP, which cannot be read" "unset FER_SETUP, or put it right"
  say "setup: $FER_SETUP"
  unset VIRTUAL_ENV
  set +u # modules and conda read variables that are not set
  # shellcheck disable=SC1090
  . "$FER_SETUP" || fail "FER_SETUP, $FER_SETUP, has ended with exit code $?" "put it right; its last command counts"
  set +e -uo pipefail
  : "${FER_PYTHON:=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}"
fi
PYTHON=${FER_PYTHON:-}
for path in "$PWD/.venv/bin/python" "$FER_SLURM/../.venv/bin/python"; do
  [ -n "$PYTHON" ] || [ ! -x "$path" ] || PYTHON=$path
done
PYTHON=${PYTHON:-python}
[[ ${FER_MAX_REQUEUES:=50} =~ ^[0-9]+$ ]] || fail "FER_MAX_REQUEUES is '$FER_MAX_REQUEUES', expected a number" \
  "export FER_MAX_REQUEUES=50"
[ "${SLURM_RESTART_COUNT:-0}" -le "$FER_MAX_REQUEUES" ] || # SLURM's own requeues count, too: after the loss of a node
  { say "requeued $SLURM_RESTART_COUNT times, FER_MAX_REQUEUES=$FER_MAX_REQUEUES: not started again"; exit 1; }
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

record() { # of this job, as SLURM has it, in a line; nothing where it cannot be asked
  # The last task of an array has the number of the array, by which SLURM shows all its tasks.
  control -o show job "$SLURM_JOB_ID" | sed -n "/^JobId=$SLURM_JOB_ID /p"
}
state() { record | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }

note() {
  asked=${asked:-$1}
  if [ "$1" = TERM ] && [ "$passed_on" = USR1 ]; then
    # Where SLURM ends the job itself, it has told all steps, too: twice would be no better.
    case $(state) in COMPLETING | CANCELLED | TIMEOUT | PREEMPTED | NODE_FAIL) return ;; esac
  fi
  pass_on
}
pass_on() { [ -z "$child" ] || kill -s "$passed_on" "$child" 2>/dev/null || true; }
trap 'note USR1' USR1
trap 'note TERM' TERM

await() { # await COMMAND...: its exit status, however often a signal interrupts the waiting
  local status=0
  "$@" &
  child=$!
  [ -z "$asked" ] || pass_on
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  wait "$child" 2>/dev/null || status=$? # the first one may have been that of the trap
  child=''
  return "$status"
}

require_node() { # the command of this script runs where the script does
  [ -n "${SLURMD_NODENAME:-}" ] || fail "$(hostname) is no node of job $SLURM_JOB_ID; salloc leaves this script here" "sbatch $0"
}

require_words() { # require_words MODULE WORDS...: a mistake in them is told now and once, by the module itself
  local status=0
  [ -z "${FER_SRUN:-}" ] || return 0 # there may be no Python outside the container
  await "${WITHIN[@]}" "$PYTHON" -m "$@" --print-config >/dev/null || status=$?
  [ "$status" != 0 ] || return 0
  [ -z "$asked" ] || finish "$STOPPED"
  [ "$status" != 2 ] || exit 2
  fail "$PYTHON cannot run $1 (exit code $status)" "make install, or export FER_PYTHON=.../bin/python"
}

all_nodes_answer() { # whether each node of the allocation runs a command
  timeout -k 5 60 srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --gres=none true >/dev/null 2>&1
}

finish() { # finish STATUS: leave, and see to it that a job that is not done comes again; a crash does not
  local status=$1 why='' now job
  [ "$status" != 0 ] || exit 0
  if [ "$status" = 2 ]; then
    why='' # settings, data, disk: the same again would be the same again
  elif [ -n "$asked" ] || [ "$status" = "$STOPPED" ]; then
    why="told to stop${asked:+ ($asked)}" # preemption with a time of grace tells the ranks only
  elif [ "$NODES" -gt 1 ] && ! all_nodes_answer; then
    why="a node does not answer"
  fi
  if [ -z "$why" ]; then
    say "ended with $status: not requeued"
    exit "$status"
  fi
  now=$(state)
  if [ -n "$now" ] && [ "$now" != RUNNING ]; then
    say "$why, and SLURM ends the job itself ($now)" # scancel; or preemption and requeue, after which it comes again
    exit "$STOPPED"
  fi
  if [ "$RESTARTS" -ge "$FER_MAX_REQUEUES" ]; then
    say "$why, but requeued $RESTARTS times already (FER_MAX_REQUEUES=$FER_MAX_REQUEUES): not again"
    exit 1
  fi
  say "$why: requeued"
  job=$(record | sed -n 's/^JobId=[0-9]* ArrayJobId=\([0-9]*\) ArrayTaskId=\([0-9]*\) .*/\1_\2/p') # not the whole array
  ! control requeue "${job:-$SLURM_JOB_ID}" || exit 0 # SLURM ends this script now
  say "scontrol cannot requeue it: exit code $STOPPED (with RequeueExit=$STOPPED in slurm.conf SLURM does)"
  exit "$STOPPED"
}
