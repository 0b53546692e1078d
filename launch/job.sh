# The life of a training job: preflight, training, and whether to start again. Part of every job script; expects
# FOLDER (where it was submitted), RUN_DIR, CONFIG, STEPS (when the run is finished), SUBMISSION (a name that all attempts
# share), REQUEUE (yes | no) and what site.env sets.
set -uo pipefail
: "${MAX_FRUITLESS:=2}" "${MAX_FAILURES:=10}" "${RETRY_SECONDS:=20}"

job=$SLURM_JOB_ID array=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then array=$SLURM_ARRAY_JOB_ID job=${array}_$SLURM_ARRAY_TASK_ID; fi
attempt=$job-${SLURM_RESTART_COUNT:-0}
state=$RUN_DIR/slurm
attempts=$state/attempts-$SUBMISSION    # a line an attempt: the step it began at, its name, time, "stopped" if it was
failures=$state/failures-$SUBMISSION    # a line an attempt that was not asked to stop and did not finish
ended=$state/ended-$SUBMISSION          # exit status and reason; while it exists no attempt begins
note=$state/failed-$attempt             # the same, of the first rank of this attempt that failed by itself
child="" stop="" forwarded="" rc=0

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
# Attempts in a row that began at the newest checkpoint, so have added nothing to it. One that was stopped before its
# first step has done no wrong, but not for ever.
give_up_without_progress() {
  local fruitless; fruitless=$(tac "$attempts" 2>/dev/null | awk -v step="$(newest_step)" -v most="$MAX_FRUITLESS" \
    '$1 != step { exit } { n++; if ($NF != "stopped") bad++ } END { if (bad >= most || n >= 10 * most) print n }')
  if [ -n "$fruitless" ]; then
    leave 1 "$fruitless attempts in a row began at step $(newest_step) and saved nothing newer: not tried again"
  fi
}
patiently() { # command...: for some minutes, since a controller may be restarting
  local output try
  for try in 1 2 3 4 5 6 7 8 9 10; do
    if output=$("$@" 2>&1); then echo "$output"; return 0; fi
    case $output in *denied* | *isabled* | *"not supported"*) break ;; esac
    sleep "$RETRY_SECONDS"
  done
  echo "$output" >&2
  return 1
}

# The ranks end the step in hand and save; a second signal would end them at once, so they get one. USR1: and the job
# ends; USR2, TERM, HUP (the limit is near, the nodes are wanted elsewhere): and it goes on later.
forward() { if [ -n "$child" ] && [ -z "$forwarded" ]; then forwarded=1; kill -USR2 "$child" 2>/dev/null; fi; }
on_signal() { say "got $1"; [ "$stop" = USR1 ] || stop=$1; forward; }
for signal in USR1 USR2 TERM HUP; do trap "on_signal $signal" "$signal"; done
# A rank a task. --wait: without it srun waits for ever for a node that is gone.
on_all_ranks() {
  [ -z "$stop" ] || return 1
  srun ${CONTAINER[@]+"${CONTAINER[@]}"} --label --kill-on-bad-exit=1 --wait=60 "$PYTHON" "$@" &
  child=$!
  [ -z "$stop" ] || forward
  # wait returns early when a signal comes.
  while wait "$child"; rc=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=""
  return "$rc"
}

say "job $job on $SLURM_JOB_NODELIST, attempt $((${SLURM_RESTART_COUNT:-0} + 1)), step $(newest_step) of $STEPS"
cd "$FOLDER" && mkdir -p "$state" || { say "$FOLDER or $state cannot be used on $(hostname)"; exit 2; }
if finished; then say "finished already"; exit 0; fi
if [ -e "$ended" ]; then say "ended already: $(sed 1d "$ended")"; exit "$(head -n 1 "$ended")"; fi
# Of two jobs with the same script the one that started later leaves.
ours=$(squeue --noheader --jobs="$job" --array --format='%S %o' | head -n 1)
other=$(squeue --noheader --states=RUNNING --format='%F %S %o' | OURS=$ours awk -v us="$array" '
  BEGIN { ours = ENVIRON["OURS"]; start = ours; sub(/ .*/, "", start); sub(/^[^ ]* /, "", ours) }
  { id = $1; when = $2; sub(/^[^ ]* [^ ]* /, "") }
  ours != "" && id != us && $0 == ours && (when < start || when == start && id + 0 < us + 0) { print id; exit }')
if [ -n "$other" ]; then say "job $other trains $RUN_DIR already: this one leaves it alone"; exit 2; fi
give_up_without_progress
echo "$(newest_step) $attempt $(date '+%FT%T')" >> "$attempts" || { say "$attempts cannot be written"; exit 1; }

unset RANK WORLD_SIZE LOCAL_RANK                                    # of whoever submitted
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))    # two jobs may share a node
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}                 # srun does not inherit it
export SLURM_EXPORT_ENV=ALL                                         # nor, with --export=NONE, what stands here
threads=$(($(nproc) / SLURM_NTASKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 MEA_FAILURE_FILE=$note
# What NCCL was doing when it hung, beside the stacks that the ranks write into the log.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_FR_BUFFER_SIZE=2000 TORCH_FR_DUMP_TEMP_FILE=$state/nccl-$attempt-rank
if declare -F setup > /dev/null; then
  set +u  # scripts of module systems use what is not set
  setup || leave 2 "setup() of site.env failed"
  set -u
fi

on_all_ranks -m megatron_mea.slurm.preflight "$RUN_DIR" && on_all_ranks -m megatron_mea train "$CONFIG"

if finished; then say "finished at step $(newest_step)"; exit 0; fi
say "srun ended with status $rc at step $(newest_step)${stop:+ after $stop}"
status=$((rc > 0 ? rc : 1))
# A node that SLURM took for lost may wake up, while the job goes on elsewhere.
if ! tail -n 1 "$attempts" | grep -qF " $attempt "; then say "another attempt has taken over"; exit "$status"; fi
if [ -e "$note" ]; then
  status=$(head -n 1 "$note") reason=$(sed -n 2p "$note")    # nothing where the disk is full
  leave "${status:-1}" "a rank failed by itself, which another attempt would not mend: ${reason:-see above}"
fi
if [ "$stop" = USR1 ]; then leave 0 "stopped as asked at step $(newest_step); submit again to go on"; fi
if [ -n "$stop" ]; then
  sed -i '$s/$/ stopped/' "$attempts"
elif [ "$rc" != 0 ]; then
  echo "$(newest_step) $attempt $(date '+%FT%T')" >> "$failures"
  if [ "$(wc -l < "$failures")" -ge "$MAX_FAILURES" ]; then leave "$rc" "failed $MAX_FAILURES times: not tried again"; fi
fi
give_up_without_progress
if [ "$REQUEUE" = no ]; then say "the next job of the chain goes on"; exit "$rc"; fi
# A job that was cancelled, or that the scheduler requeues itself, runs no more. No answer is no reason to give up.
now=$(patiently squeue --noheader --array --jobs="$job" --format=%T)
if [ -n "$now" ] && [ "$now" != RUNNING ]; then say "ended from outside: only SLURM may requeue it"; exit "$status"; fi
say "into the queue again"
# It ends this shell with TERM.
trap 'exit 0' TERM
if patiently scontrol requeue "$job"; then sleep 300 & wait; exit 0; fi
say "this cluster refuses to requeue: submit again, or a chain (submit --chain N)"
exit 1
