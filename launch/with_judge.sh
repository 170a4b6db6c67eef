#!/usr/bin/env bash
# Run a command with its judge: start the judge's server when the command needs it, and stop the server when the command ends.
#   VLLM=~/vllm/bin/vllm launch/with_judge.sh MODEL [word of vllm ...] -- COMMAND [WORD ...]
# RECIPES_JUDGE_URL tells the command where the judge answers. It creates the file RECIPES_JUDGE_WANTED when its own models have left the GPU, and
# waits for the same name with .answers at its end. What the server says goes into a log beside the job's own.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" -- "*) ;; *) sed -n '2,4s/^# //p' "$0" >&2; exit 2 ;; esac
MODEL=$1 WORDS=() SERVER='' COMMAND=''
shift
while [ "$1" != -- ]; do WORDS+=("$1"); shift; done
shift
# A port that is free now, and a name that only this server goes by: whoever else may answer there is not taken for it.
read -r PORT NAME < <(python3 -c 'import secrets, socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1], "judge-" + secrets.token_hex(8))')
LOG=${JUDGE_LOG:-${TMPDIR:-/tmp}/judge-$PORT.log}   # of all tries of a job: what a judge said before it failed stays
WANTED=${LOG%.log}.wanted ANSWERED=''
export RECIPES_JUDGE_WANTED=$WANTED RECIPES_JUDGE_URL=http://127.0.0.1:$PORT/v1 NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"

# shellcheck disable=SC2086,SC2317
finish() {
  rm -f "$WANTED" "$WANTED.answers"
  kill $COMMAND $SERVER 2> /dev/null || true
  [ -n "$SERVER" ] || return 0
  for _ in {1..60}; do kill -0 "$SERVER" 2> /dev/null || return 0; sleep 0.5; done
  kill -KILL "$SERVER"
}
ended() { echo "the judge's server ended $1:" >&2; tail -n 5 "$LOG" >&2; exit 5; }
# 0: this server answers; 3: somebody else does; else nobody does yet.
served() {
  python3 -c 'import json, sys, urllib.request as u
page = u.build_opener(u.ProxyHandler({})).open(sys.argv[1] + "/models", timeout=10).read()
try: names = [model["id"] for model in json.loads(page)["data"]]
except Exception: names = []
sys.exit(0 if sys.argv[2] in names else 3)' "$RECIPES_JUDGE_URL" "$NAME" 2> /dev/null
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
rm -f "$WANTED" "$WANTED.answers"
"$@" &
COMMAND=$!
while kill -0 "$COMMAND" 2> /dev/null; do
  if [ -z "$SERVER" ] && [ -e "$WANTED" ]; then
    "$HERE/vllm_server.sh" "$MODEL" --port "$PORT" "${WORDS[@]}" --served-model-name "$MODEL" "$NAME" >> "$LOG" 2>&1 &
    SERVER=$! SECONDS=0
    echo "judge: $MODEL starts at $RECIPES_JUDGE_URL (log: $LOG)"
  elif [ -n "$SERVER" ] && [ -z "$ANSWERED" ]; then
    CODE=0
    served || CODE=$?
    kill -0 "$SERVER" 2> /dev/null || ended "before it answered"
    [ "$CODE" != 3 ] || { echo "another server answers at $RECIPES_JUDGE_URL, not the one that was started; its log: $LOG" >&2; exit 5; }
    [ "$CODE" != 0 ] || { ANSWERED=1; touch "$WANTED.answers"; echo "judge: answers after $SECONDS s"; }
    [ "$SECONDS" -lt "${JUDGE_START_S:-1800}" ] || { echo "the judge does not answer after $SECONDS s; its log: $LOG" >&2; exit 5; }
  elif [ -n "$SERVER" ]; then
    kill -0 "$SERVER" 2> /dev/null || ended "while it was needed"
  fi
  sleep 0.5 & wait $!
done
wait "$COMMAND" && CODE=0 || CODE=$?
COMMAND=
exit "$CODE"
