# shellcheck shell=bash disable=SC2034,SC2154
# What all jobs of `recipes launch` share: signals, requeues, exit codes. The scripts in runs/NAME/slurm/ source it. Before that, they set
#   FOLDER JOB        where scripts, logs and exit codes lie, and this job's name there
#   NODES PROCESSES   how many nodes the script is written for, and how many processes on each
#   MAX_REQUEUES      how often a stopped job is requeued
# and after that, they call
#   run COMMAND       start it, hand signals on, wait for its end and find its true exit code
#   finish            write the exit code, or requeue the job
set -o pipefail
[ -d "$FOLDER" ] || { echo "this node cannot see $FOLDER: set env.RECIPES_RUNS_ROOT in the profile" >&2; exit 5; }
TASK=$JOB${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID} TRY=${SLURM_RESTART_COUNT:-0}
export REPORT=$FOLDER/$TASK.reported.$TRY JUDGE_LOG=$FOLDER/$TASK.judge.log
say() { printf '%(%F %T)T [%s job=%s try=%s] %s\n' -1 "$TASK" "${SLURM_JOB_ID:-none}" "$TRY" "$*"; }
environment_failed() {
  say "the environment setup failed: line ${BASH_LINENO[0]} of $FOLDER/$JOB.sbatch"
  echo 5 > "$FOLDER/$TASK.exit_code"; exit 5
}

# Where the ranks meet: the first node, by its address where compute nodes do not know each other's names, and a port of this job's own.
# Below 32768, from which Linux hands out ports to others.
export HEAD=127.0.0.1 PORT=$((12000 + ${SLURM_JOB_ID:-$$} % 20000))
if [ -n "$SLURM_JOB_ID" ]; then
  echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" > "$FOLDER/$JOB.job"   # `recipes launch status` finds a job that was submitted by hand
  # Another try of this job asks an earlier one that still holds a run to stop.
  export RECIPES_JOB="Slurm job $SLURM_JOB_ID" RECIPES_JOB_RESTARTS=$TRY
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  getent hosts "$HEAD" > /dev/null || HEAD=$(scontrol show node "$HEAD" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  # Every srun hands the environment on, ends all nodes two minutes after the first at the latest, and holds no line back.
  export SLURM_EXPORT_ENV=ALL SLURM_KILL_BAD_EXIT=1 SLURM_WAIT=120 SLURM_UNBUFFEREDIO=1
  [ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
else
  srun() { while [[ $1 == -* ]]; do shift; done; exec "$@"; }   # without Slurm this machine is the only node
fi

run() {
  if [ "${SLURM_NNODES:-1}" != "$NODES" ] && [ -n "$SLURM_JOB_ID" ]; then
    say "this script is written for $NODES node(s), but Slurm gave $SLURM_NNODES: write another with recipes launch ... --nodes $SLURM_NNODES"
    echo 2 > "$FOLDER/$TASK.exit_code"; exit 2
  fi
  if [ "$TRY" -gt 0 ] && [ "$(cat "$FOLDER/$TASK.exit_code" 2> /dev/null)" = 0 ]; then
    say "done by an earlier try of this job"; exit 0   # after a preemption Slurm queues a job again even when it has finished since
  fi
  rm -rf "$FOLDER/$TASK.reported".* "$FOLDER/$TASK.exit_code"
  [ "$TRY" -gt 0 ] || rm -f "$FOLDER/$TASK.requeues"   # of an earlier submission
  # A task holds the cores of all its processes. Without Slurm the libraries count the machine's.
  [ -z "$SLURM_JOB_ID" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + PROCESSES - 1) / PROCESSES))}"

  # Slurm sends USR2 to this shell before the time limit, TERM when it ends the job. A training gets USR2, again and again until it
  # has saved, since one that arrives before it listens is lost. Other stages keep what they did and are simply ended.
  SIGNAL=
  trap 'SIGNAL=USR2; say "USR2: the time limit is near, or a save was requested: saving"; ask' USR2
  trap 'SIGNAL=TERM; say "TERM: Slurm ends this job"' TERM
  trap 'SIGNAL=INT; case $JOB in train*) ;; *) ask ;; esac' INT   # Ctrl-C, without Slurm: a training hears it by itself
  say "on ${SLURM_JOB_NODELIST:-this machine}: $NODES node(s) x $PROCESSES process(es), meeting at $HEAD:$PORT"
  "$@" & COMMAND=$!
  while :; do
    [ "$SIGNAL" = USR2 ] && kill -0 "$COMMAND" 2> /dev/null && { sleep 1; ask; continue; }
    wait "$COMMAND"; CODE=$?
    kill -0 "$COMMAND" 2> /dev/null || break
  done
  case $JOB in train*)   # the launcher loses the true code; each node left it in a file, and without one nothing was finished
    local true_code
    true_code=$(sort -n "$REPORT".* 2> /dev/null | grep -vxE '0|75' | head -n 1)
    CODE=${true_code:-$(cat "$REPORT.0" 2> /dev/null || echo $((CODE == 0 ? 1 : CODE)))} ;;
  esac
}
ask() { case $JOB in train*) kill -USR2 "$COMMAND" ;; *) kill -TERM "$COMMAND" ;; esac 2> /dev/null; }

finish() {
  if [ -n "$SLURM_JOB_ID" ] && later_try; then say "a later try of this job has taken over"; exit "$CODE"; fi
  if [ "$SIGNAL" != TERM ] && { [ "$CODE" = 75 ] || { [ "$SIGNAL" = USR2 ] && [ "$CODE" -gt 75 ]; }; }; then   # stopped, not failed
    # Only these count: Slurm's own count holds preemptions and lost nodes, too.
    local requeues; requeues=$(cat "$FOLDER/$TASK.requeues" 2> /dev/null || echo 0)
    if [ -n "$SLURM_JOB_ID" ] && [ "$requeues" -lt "$MAX_REQUEUES" ]; then
      echo $((requeues + 1)) > "$FOLDER/$TASK.requeues"
      say "saved; requeueing the job"; scontrol requeue "$(own_id)" && { sleep 120 & wait $!; exit 75; }   # Slurm ends this shell here
    fi
    say "saved, but not requeued: launch it again to continue"; CODE=75
  fi
  echo "$CODE" > "$FOLDER/$TASK.exit_code"; say "exit code $CODE${SIGNAL:+ after $SIGNAL}"
  exit "$CODE"
}
# Whether Slurm gave this node up and queued the job again while this shell lives: what follows is the later try's to say. A controller
# that does not answer says nothing of a later try.
later_try() {
  local restarts
  restarts=$(scontrol show job "$(own_id)" -o 2> /dev/null | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')
  [ "${restarts:-0}" -gt "$TRY" ]
}
# One task of an array bears the number of the whole array: by that number Slurm would show, and queue again, every task.
own_id() { echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }
