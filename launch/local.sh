#!/usr/bin/env bash
# The stages of `recipes launch` without Slurm: one after another on this machine, with the same files, commands and logs.
#   launch/local.sh RECIPE|STUDY [--stages train,eval,report] [--accelerate A] [section.key=value ...]
# Stops at the first stage that fails, with its exit code; run it again to continue.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*) sed -n '2,4s/^# //p' "$0"; exit 0 ;; esac
RECIPES=$(command -v recipes || echo "$HERE/../.venv/bin/recipes")
case " $* " in *" --stages"[\ =]*) ;; *) set -- "$@" --stages train,eval,report ;; esac
FOLDER=$("$RECIPES" launch "$@" --prepare)
PATH=$(dirname "$RECIPES"):$PATH
while read -r stage; do
  echo "==> $stage   (log: $FOLDER/$stage.log)"
  bash "$HERE/job.sbatch" "$FOLDER" "$stage" < /dev/null > >(tee -a "$FOLDER/$stage.log") 2>&1 || exit
done < "$FOLDER/order"
