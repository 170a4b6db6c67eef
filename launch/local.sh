#!/usr/bin/env bash
# The stages of `recipes launch` without Slurm: one after another on this machine, with the same scripts and logs.
#   launch/local.sh RECIPE|STUDY [--stages train,eval,report] [--accelerate A] [section.key=value ...]
# Stops at the first stage that fails, with its exit code; run it again to continue.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*) sed -n '2,4s/^# //p' "$0"; exit 0 ;; esac
RECIPES=$(command -v recipes || echo "$HERE/../.venv/bin/recipes")
case " $* " in *" --stages"[\ =]*) ;; *) set -- "$@" --stages train,eval,report ;; esac
FOLDER=$("$RECIPES" launch "$@" --prepare)
PATH=$(dirname "$RECIPES"):$PATH
while read -r job task; do
  log=$FOLDER/$job${task:+.$task}.log
  echo "==> $job${task:+ $task}   (log: $log)"
  SLURM_ARRAY_TASK_ID=$task bash "$FOLDER/$job.sbatch" < /dev/null > >(tee -a "$log") 2>&1 || exit
done < "$FOLDER/order"
