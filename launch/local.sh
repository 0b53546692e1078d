#!/usr/bin/env bash
# Trains on NPROC processes of this machine:  bash launch/local.sh NPROC CONFIG [KEY=VALUE ...]
#
# Starts the ranks itself, each with the environment that srun would give it. Forwards USR2, TERM, INT and HUP, which
# make the run save and stop, as it does when this script is killed. When one rank fails it ends the others and returns
# that rank's status.
set -u

usage="usage: bash launch/local.sh NPROC CONFIG [KEY=VALUE ...]"
if [ $# -lt 2 ]; then echo "$usage" >&2; exit 2; fi
nproc=$1; shift
case $nproc in
  ''|*[!0-9]*|0*|???????*)
    printf "local.sh: error: NPROC\n  got:      '%s'\n  expected: a number from 1 to 999999, without leading zeros\n%s\n" "$nproc" "$usage" >&2
    exit 2 ;;
esac
# The active environment, or the one that launch/quickstart.sh made here.
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

# A layout that cannot work is refused before there is a process to end.
"$python" - "$nproc" "$@" < "$(dirname "$0")/check_layout.py" || exit $?

export WORLD_SIZE=$nproc MASTER_ADDR=127.0.0.1 PYTHONUNBUFFERED=1
if [ -z "${MASTER_PORT:-}" ]; then
  MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
export MASTER_PORT
# Several ranks with all cores each would wait for one another at every operation.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$(( cores > nproc ? cores / nproc : 1 ))
fi

pids=()
forward() { for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done; }
trap 'forward USR2' USR2
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP    # does nothing under nohup

# Ranks see this pipe end when the script is gone, however that happened.
pipe=$(mktemp -u "${TMPDIR:-/tmp}/mea-launcher.XXXXXX")
if mkfifo -m 600 "$pipe"; then
  exec {alive}<>"$pipe" {watched}<"$pipe"
  rm "$pipe"
  export MEA_LAUNCHER_PIPE=$watched
else
  exec {alive}</dev/null
fi

declare -A running
for (( rank = 0; rank < nproc; rank++ )); do
  RANK=$rank LOCAL_RANK=$rank "$python" -m megatron_mea train "$@" {alive}>&- &
  pids+=($!); running[$!]=1
done

status=0
while (( ${#running[@]} )); do
  sleep 0.2
  for pid in "${!running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then continue; fi
    wait "$pid" 2>/dev/null; code=$?
    unset "running[$pid]"
    if (( code != 0 && status == 0 )); then
      status=$code
      # A rank asked politely would finish its step first, which it cannot without the one that failed.
      for other in "${!running[@]}"; do
        kill -KILL "$other" 2>/dev/null; wait "$other" 2>/dev/null
      done
    fi
  done
done
exit "$status"
