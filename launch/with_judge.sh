#!/usr/bin/env bash
# Run a command beside the judge it asks: start the judge's server, wait until it answers, run the command, end the server with it.
#   VLLM=~/vllm/bin/vllm launch/with_judge.sh MODEL [word of vllm ...] -- COMMAND [WORD ...]
# RECIPES_JUDGE_URL tells the command where the judge answers. What the server says goes into a log beside the job's own.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" -- "*) ;; *) sed -n '2,4s/^# //p' "$0" >&2; exit 2 ;; esac
MODEL=$1 WORDS=() SERVER='' COMMAND=''
shift
while [ "$1" != -- ]; do WORDS+=("$1"); shift; done
shift
PORT=${PORT:-$((20000 + $$ % 20000))}   # job.sbatch has one from the job's id
LOG=${REPORT:-${TMPDIR:-/tmp}/judge-$PORT}
LOG=${LOG%.reported}.judge.log
export RECIPES_JUDGE_URL=http://127.0.0.1:$PORT/v1

# shellcheck disable=SC2086,SC2317
finish() {
  kill $COMMAND $SERVER 2> /dev/null || true
  for _ in {1..60}; do kill -0 "$SERVER" 2> /dev/null || return 0; sleep 0.5; done
  kill -KILL "$SERVER"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
"$HERE/vllm_server.sh" "$MODEL" --host 127.0.0.1 --port "$PORT" "${WORDS[@]}" > "$LOG" 2>&1 &
SERVER=$!
echo "judge: $MODEL starts at $RECIPES_JUDGE_URL (log: $LOG)"
until python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/models", timeout=10)' "$RECIPES_JUDGE_URL" 2> /dev/null; do
  kill -0 "$SERVER" 2> /dev/null || { echo "the judge's server ended before it answered:" >&2; tail -n 5 "$LOG" >&2; exit 5; }
  [ "$SECONDS" -lt "${JUDGE_START_S:-1800}" ] || { echo "the judge does not answer after $SECONDS s; its log: $LOG" >&2; exit 5; }
  sleep 2 & wait $!
done
echo "judge: answers after $SECONDS s"
"$@" &
COMMAND=$!
wait "$COMMAND" && CODE=0 || CODE=$?
COMMAND=
exit "$CODE"
