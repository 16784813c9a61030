# shellcheck shell=bash
# What the sbatch files share: running a recipe or a command in the tasks of a job, saving before the time limit, and
# putting the job back into the queue. Source it in the checkout.
. recipes/utils/log.sh

requeues=${REQUEUES:-100}   # how often a job may be put back
most_killed=4               # ends by SIGKILL in a row: the job is not put back after the last of them
warning_seconds=100         # of the 120 that --signal gives: after these, the job is put back even if it has not saved
TASK_CODES=$PWD/.slurm-${SLURM_JOB_ID:?submit this file with sbatch}.codes
export TASK_CODES # see task.sh

# run_job NPROC RECIPE|COMMAND [ARGUMENT…] runs a recipe with --launcher slurm --nproc NPROC, or a w2vscale command in all
# tasks, and exits with its code or puts the job back into the queue.
run_job() {
  local command code watch=
  (($# > 1)) || die "nothing to run: give a recipe (recipes/…/run.sh) or a w2vscale command"
  rm -f "$TASK_CODES"
  trap warn USR1
  if [[ $2 == *.sh ]]; then
    bash "$2" --launcher slurm --nproc "$1" "${@:3}" &
  else
    run_command "$@" &
  fi
  command=$!
  # A trap ends `wait` early.
  while kill -0 "$command" 2>/dev/null; do wait "$command" || true; done
  code=0
  wait "$command" || code=$?
  if [[ -n $watch ]]; then kill "$watch" 2>/dev/null || true; fi
  if [[ -s $TASK_CODES ]]; then code=$(head -n 1 "$TASK_CODES"); fi
  rm -f "$TASK_CODES"
  if killed_again "$code"; then
    log "job $SLURM_JOB_ID: exit code 137 for the ${most_killed}th time in a row; not put back: is the memory too small?"
  elif ((code == 75 || code > 128)); then
    requeue "exit code $code"
  fi
  exit "$code"
}

# killed_again CODE counts the ends by SIGKILL in a row, over requeues. Is it the last that is allowed?
killed_again() {
  local killed=$PWD/.slurm-$SLURM_JOB_ID.killed
  if (($1 == 137)); then
    echo >>"$killed"
    if (($(wc -l <"$killed") < most_killed)); then return 1; fi
  fi
  rm -f "$killed"
  (($1 == 137))
}

# run_command NPROC COMMAND [ARGUMENT…]
run_command() {
  trap - USR1
  launcher=slurm nproc=$1
  . recipes/utils/path.sh
  . recipes/utils/cmd.sh
  on_ranks "${@:2}"
}

# The time limit is near: all steps of the job get the signal, and save. (Without --batch, scancel leaves out this script.)
warn() {
  log "job $SLURM_JOB_ID: SIGUSR1, the time limit is near: saving"
  scancel --signal=USR1 "$SLURM_JOB_ID" || true
  if [[ -n $watch ]]; then return; fi
  requeue_late &
  watch=$!
}

requeue_late() {
  trap 'kill "$!"; exit' TERM # of run_job, when the command has ended
  sleep "$warning_seconds" &
  wait "$!"
  requeue "not finished in $warning_seconds s"
}

# requeue REASON
requeue() {
  if ((${SLURM_RESTART_COUNT:-0} >= requeues)); then
    log "job $SLURM_JOB_ID: $1; not put back, because it was put back $requeues times (REQUEUES)"
    return
  fi
  log "job $SLURM_JOB_ID: $1; putting it back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || log "job $SLURM_JOB_ID: it cannot be put back (see above); submit it again to continue"
}
