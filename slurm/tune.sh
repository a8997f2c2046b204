#!/usr/bin/env bash
# Searches settings with Ray inside of one allocation; the words after the script go to tune.search:
#
#   sbatch slurm/tune.sh --config patt_lite_plus --data /data/archive.zip --trials 40 --gpus-per-trial 1
#   sbatch --nodes=4 slurm/tune.sh --config vit --data /data/fer2013.zip --gpus-per-trial 0.5 --workers-per-trial 1
#   sbatch --gpus-per-node=0 --cpus-per-task=4 slurm/tune.sh --trials 12                       # CPUs
#
# One node: Ray listens on loopback only. More: on the nodes' own addresses, for those that know the token of the job.
# A job that is requeued goes on with its search.
#SBATCH --job-name=fer_tune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1      # one Ray on each; leave it
#SBATCH --gpus-per-node=4        # what trials share; 0: none
#SBATCH --cpus-per-task=8        # the same for cores
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@180      # as in train.sh
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
for FER_SLURM in "${FER_SLURM:-.}" "$(dirname "${BASH_SOURCE[0]}")" "$PWD/slurm" "${SLURM_SUBMIT_DIR:-.}/slurm"; do
  [ ! -r "$FER_SLURM/lib.sh" ] || break
done
[ -r "$FER_SLURM/lib.sh" ] ||
  { echo "error: no lib.sh; submit from the repository, or export FER_SLURM=.../slurm" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
. "$FER_SLURM/lib.sh"
require_node

# -- which search: a name that the next start of this job knows, too

name=job-$SLURM_JOB_ID
named=''
resumed=''
kept=() # words that no search notes
folder=tune_runs
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --name) named=1 name=${words[i + 1]:-} ;;
    --name=*) named=1 name=${words[i]#--name=} ;;
    --dir) folder=${words[i + 1]:-} ;;
    --dir=*) folder=${words[i]#--dir=} ;;
    --address | --address=*) fail "--address is not for this script: it starts Ray itself" "leave it out" ;;
    --resume) named=1 resumed=1 ;;
    --concurrent) kept+=("${words[@]:i:2}") ;;
    --concurrent=*) kept+=("${words[i]}") ;;
  esac
done
[ -n "$named" ] || words+=(--name "$name")
if [ "$RESTARTS" -gt 0 ] && [ -e "$folder/$name/search.yaml" ]; then
  words=(--dir "$folder" --name "$name" --resume "${kept[@]}") # all else that it was asked for stands there
elif [ -z "$resumed" ]; then
  require_words tune.search "${words[@]}" # before Ray is up
fi

# -- Ray, on each node

# Ports for this job alone: 200 of them from 10000 + 200 x (number of the job mod 90) on, or the next 200 that are free.
# shellcheck disable=SC2016,SC2089
FER_PORTS='
import os, socket
def free(port):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind(("0.0.0.0", port))
        except OSError: return False
        return True
job = int(os.environ["SLURM_JOB_ID"])
for i in range(90):
    base = 10000 + 200 * ((job + i) % 90)
    if all(free(port) for port in range(base, base + 200)):
        print(base)
        break
'
# The head is on the first node, where this script runs. A TERM (preemption, scancel) is told to this script, and Ray
# stays until the search has noted what it has, but not until SLURM kills it; USR1 is the end of Ray.
# shellcheck disable=SC2016
ON_NODE='
ray=
trap "[ \$SLURM_NODEID != 0 ] || kill -s TERM $FER_BATCH 2>/dev/null; (sleep 15; kill -s USR1 $$) &" TERM
trap "[ -z \"\$ray\" ] || kill -s TERM \$ray 2>/dev/null; ended=1" USR1
ended=
base=$FER_PORT
where=(--node-ip-address="$FER_ADDRESS" --port="$FER_PORT" --head --include-dashboard=false)
if [ "$SLURM_NODEID" != 0 ]; then
  base=$("$@" -c "$FER_PORTS")
  where=(--address="$FER_ADDRESS:$FER_PORT")
  for ((i = 0; i < 600; i++)); do (exec 3<>"/dev/tcp/$FER_ADDRESS/$FER_PORT") 2>/dev/null && break; sleep 0.2; done
fi
[ -n "$base" ] || { echo "error: no 200 free ports between 10000 and 28000 on $(hostname)" >&2; exit 2; }
link=$FER_RAY_TEMP.$SLURM_NODEID.env # Ray writes the path of Python into a shell command, without quotes
environment=$("$@" -c "import sys; print(sys.prefix)")
case $environment in
  *[[:space:]]*) ln -sfn "$environment" "$link" && set -- "${@:1:$#-1}" "$link/bin/python" ;;
esac
"$@" -m ray.scripts.scripts start --block --disable-usage-stats --log-color=false "${where[@]}" \
  --temp-dir="$FER_RAY_TEMP" --num-cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
  --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --object-store-memory=134217728 \
  --node-manager-port=$((base + 1)) --object-manager-port=$((base + 2)) --runtime-env-agent-port=$((base + 3)) \
  --dashboard-agent-listen-port=$((base + 4)) --dashboard-agent-grpc-port=$((base + 5)) \
  --metrics-export-port=$((base + 6)) --min-worker-port=$((base + 10)) --max-worker-port=$((base + 199)) \
  $([ "$SLURM_NODEID" != 0 ] || echo --ray-client-server-port=$((base + 7))) >"$FER_RAY_TEMP.$SLURM_NODEID.log" 2>&1 &
ray=$!
[ -z "$ended" ] || kill -s TERM $ray
status=0
while kill -0 $ray 2>/dev/null; do wait $ray; status=$?; done
if [ -n "$ended" ]; then rm -rf "$FER_RAY_TEMP" "$FER_RAY_TEMP.$SLURM_NODEID.log" "$link"; exit 0; fi
tail -n 20 "$FER_RAY_TEMP.$SLURM_NODEID.log" >&2
exit $status'

FER_BATCH=$$
FER_RAY_TEMP=/tmp/fer_ray_$SLURM_JOB_ID.$RESTARTS # short: Unix sockets in it have names of 107 letters at most
FER_ADDRESS=127.0.0.1
[ "$NODES" = 1 ] || FER_ADDRESS=$(first_node)
FER_PORT=$("${WITHIN[@]}" "$PYTHON" -c "$FER_PORTS") || fail "$PYTHON does not run" "export FER_PYTHON=.../bin/python"
[ -n "$FER_PORT" ] || fail "no 200 free ports between 10000 and 28000 on $(hostname)" "another node"
# shellcheck disable=SC2090
export FER_BATCH FER_RAY_TEMP FER_ADDRESS FER_PORT FER_PORTS
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN
[ "$NODES" != 1 ] || export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # or Ray takes another address than the loopback's

ray=''
end_ray() { # whatever happens; a second call does nothing
  [ -n "$ray" ] || return 0
  kill -s USR1 "$ray" 2>/dev/null
  for ((i = 0; i < 300; i++)); do
    kill -0 "$ray" 2>/dev/null || break
    sleep 0.1
  done
  kill -s KILL "$ray" 2>/dev/null
  ray=''
}
trap end_ray EXIT

say "job $SLURM_JOB_ID, start $((RESTARTS + 1)): Ray on $NODES nodes (${SLURM_JOB_NODELIST:-}), $FER_ADDRESS:$FER_PORT"
srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
  bash -c "$ON_NODE" fer_ray "${WITHIN[@]}" "$PYTHON" &
ray=$!

# shellcheck disable=SC2016
WAIT='
import os, socket, sys, time
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
end = time.monotonic() + 180
while True:
    try:
        socket.create_connection((os.environ["FER_ADDRESS"], int(os.environ["FER_PORT"])), 1).close()
        ray.init(os.environ["FER_ADDRESS"] + ":" + os.environ["FER_PORT"], logging_level="ERROR", log_to_driver=False)
        while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]) and time.monotonic() < end: time.sleep(0.2)
        sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
    except (OSError, RuntimeError) as error:
        if time.monotonic() > end: sys.exit(str(error))
        time.sleep(0.5)
'
passed_on=TERM
await "${WITHIN[@]}" "$PYTHON" -c "$WAIT" "$NODES"
status=$?
if [ "$status" = 0 ]; then
  await "${WITHIN[@]}" "$PYTHON" -m tune.search "${words[@]}" --address "$FER_ADDRESS:$FER_PORT"
  status=$?
else
  say "Ray has not come up on all nodes"
fi
[ -z "$asked" ] || [ "$status" = 0 ] || status=$STOPPED # where Ray was gone first, the search had no better word for it
end_ray
finish "$status"
