# The life of a training job: preflight, training, and whether to start again. Part of every job script; expects
# RUN_DIR, CONFIG, STEPS (when the run is finished), SUBMISSION (a name that all attempts share), REQUEUE (yes | no) and
# what site.env sets.
set -uo pipefail
: "${MAX_FRUITLESS:=2}" "${MAX_FAILURES:=10}"
[ -n "${CONTAINER+set}" ] || CONTAINER=()

state=$RUN_DIR/slurm
attempts=$state/attempts-$SUBMISSION    # a line an attempt: the step it began at, job, time
failures=$state/failures-$SUBMISSION    # a line an attempt that was not asked to stop and did not finish
ended=$state/ended-$SUBMISSION          # exit status and reason; while it exists no attempt begins
job=$SLURM_JOB_ID array=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then array=$SLURM_ARRAY_JOB_ID job=${array}_$SLURM_ARRAY_TASK_ID; fi
child="" stop="" rc=0
mkdir -p "$state"

say() { echo "[$(date '+%F %T')] $*"; }
leave() { say "$2"; [ -e "$ended" ] || printf '%s\n' "$1" "$2" > "$ended"; exit "$1"; }
finished() {
  local step; step=$(sed -n 's/.*"step": *\([0-9]*\).*/\1/p' "$RUN_DIR/FINISHED" 2>/dev/null)
  [ -n "$step" ] && [ "$step" -ge "$STEPS" ]
}
newest_step() {
  local step; step=$(ls "$RUN_DIR/checkpoints" 2>/dev/null | sed -n 's/^step_0*\([0-9]*\)$/\1/p' | sort -n | tail -n 1)
  echo "${step:-0}"
}
# The attempts that began at the newest checkpoint, so have added nothing to it.
fruitless() { tac "$attempts" 2>/dev/null | awk -v step="$(newest_step)" '$1 != step { exit } { n++ } END { print n + 0 }'; }
give_up_without_progress() {
  if [ "$(fruitless)" -ge "$MAX_FRUITLESS" ]; then
    leave 1 "$(fruitless) attempts in a row began at step $(newest_step) and saved nothing newer: not tried again"
  fi
}

# The ranks end the step in hand and save. USR1: and the job ends; USR2, TERM (the limit is near, the nodes are wanted
# elsewhere): and it goes on later.
on_signal() { say "got $1"; stop=$1; [ -z "$child" ] || kill -USR2 "$child" 2>/dev/null; }
for signal in USR1 USR2 TERM; do trap "on_signal $signal" "$signal"; done
# A rank a task. --wait: without it srun waits for ever for a node that is gone.
on_all_ranks() {
  srun "${CONTAINER[@]}" --label --kill-on-bad-exit=1 --wait=60 "$PYTHON" "$@" &
  child=$!
  # wait returns early when a signal comes.
  while wait "$child"; rc=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=""
  return "$rc"
}

say "job $job on $SLURM_JOB_NODELIST, attempt $((${SLURM_RESTART_COUNT:-0} + 1)), step $(newest_step) of $STEPS"
if finished; then say "finished already"; exit 0; fi
if [ -e "$ended" ]; then say "ended already: $(sed 1d "$ended")"; exit "$(head -n 1 "$ended")"; fi
script=$(squeue --noheader --jobs="$job" --format=%o | head -n 1)
other=$(squeue --noheader --states=RUNNING --format='%F %o' | SCRIPT=$script awk -v us="$array" \
  '{ id = $1; sub(/^[^ ]* /, "") } id != us && $0 == ENVIRON["SCRIPT"] { print id; exit }')
if [ -n "$script" ] && [ -n "$other" ]; then say "job $other trains $RUN_DIR already: this one leaves it alone"; exit 2; fi
give_up_without_progress
echo "$(newest_step) $job $(date '+%FT%T')" >> "$attempts"

export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))    # two jobs may share a node
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}                 # srun does not inherit it
threads=$(($(nproc) / SLURM_NTASKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 MEA_FAILURE_FILE=$ended
# What NCCL was doing when it hung, beside the stacks that the ranks write into the log.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE=$state/nccl-$job-rank
if declare -F setup > /dev/null; then setup; fi

on_all_ranks -m megatron_mea.cluster.preflight "$RUN_DIR" && [ -z "$stop" ] && on_all_ranks -m megatron_mea train "$CONFIG"

if finished; then say "finished at step $(newest_step)"; exit 0; fi
say "srun ended with status $rc at step $(newest_step)${stop:+ after $stop}"
if [ -e "$ended" ]; then
  say "a rank failed by itself, which another attempt would not mend: $(sed -n 2p "$ended")"
  status=$(head -n 1 "$ended"); exit "$((status > 0 ? status : 1))"
fi
if [ "$stop" = USR1 ]; then leave 0 "stopped as asked at step $(newest_step); submit again to go on"; fi
if [ -z "$stop" ] && [ "$rc" != 0 ]; then
  echo "$(newest_step) $job $(date '+%FT%T')" >> "$failures"
  if [ "$(wc -l < "$failures")" -ge "$MAX_FAILURES" ]; then leave "$rc" "failed $MAX_FAILURES times: not tried again"; fi
fi
give_up_without_progress
if [ "$REQUEUE" = no ]; then say "the next job of the chain goes on"; exit "$rc"; fi
# A job that was cancelled, or that the scheduler requeues itself, runs no more.
if [ "$(squeue --noheader --array --jobs="$job" --format=%T)" != RUNNING ]; then say "not requeued: this job was ended"; exit "$rc"; fi
say "into the queue again"
# It ends this shell with TERM.
trap 'exit 0' TERM
if scontrol requeue "$job"; then sleep 300 & wait; exit 0; fi
leave 1 "this cluster refuses to requeue: submit with --chain N"
