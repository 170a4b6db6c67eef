#!/usr/bin/env bash
# Serve a model or a run with vLLM, which pins its own torch and transformers and therefore needs its own environment:
#   python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm
#   VLLM=~/vllm/bin/vllm launch/vllm_server.sh prometheus-eval/prometheus-7b-v2.0     # a judge
#   VLLM=~/vllm/bin/vllm launch/vllm_server.sh runs/my-run                            # a run: merged/ or model/ if there, else its adapter
# Further arguments go to `vllm serve` (--port 8001, --tensor-parallel-size 2). A merged model is about a third faster than an adapter.
# It listens on this machine alone, as it asks for no key: --host 0.0.0.0 --api-key KEY lets others in.
set -euo pipefail
fail() { echo "vllm_server: $2" >&2; exit "$1"; }
usage() { grep '^#' "$0" | sed '1d; s/^# \{0,1\}//'; }
case ${1:-} in -h | --help) usage; exit 0 ;; '' | -*) usage >&2; exit 2 ;; esac
target=${1%/}; shift
vllm=${VLLM:-vllm}
command -v "$vllm" >/dev/null || fail 5 "'$vllm' not found; set VLLM to the vllm of its own environment"

if [ ! -f "$target/run.json" ]; then
    exec "$vllm" serve "$target" --served-model-name "$target" --host 127.0.0.1 "$@"
fi
name=$(basename "$target")
for weights in "$target/merged" "$target/model"; do
    if [ -f "$weights/config.json" ]; then exec "$vllm" serve "$weights" --served-model-name "$name" --host 127.0.0.1 "$@"; fi
done
adapter=$target/adapter/adapter_config.json
[ -f "$adapter" ] || fail 2 "$target has no merged/, model/ or adapter/"
{ read -r rank; read -r base; } < <(python3 -c 'import json, sys
c = json.load(open(sys.argv[1])); print(max([c["r"], *(c.get("rank_pattern") or {}).values()])); print(c["base_model_name_or_path"])' "$adapter")
# On the 16-bit base an adapter of a quantized one gives other answers, without a word.
quantized=$(python3 -c 'import json, sys; print((json.load(open(sys.argv[1])).get("guard") or {}).get("quantization") or "")' "$target/run.json")
[ -z "$quantized" ] || fail 2 "$name was trained on a quantized base, which this does not serve: recipes merge $name, then serve it again"
case $base in /*) [ -d "$base" ] || fail 2 "the base model of $name is no longer at $base; merge it where the base is: recipes merge $name" ;; esac
limit=
for known in 8 16 32 64 128 256 320 512; do [ "$known" -ge "$rank" ] && { limit=$known; break; }; done   # the values vLLM knows; its default is 16
[ -n "$limit" ] || fail 2 "the adapter has rank $rank, vLLM serves at most 512: recipes merge $name, then serve it again"
exec "$vllm" serve "$base" --served-model-name "$base" --enable-lora --max-lora-rank "$limit" --lora-modules "$name=$target/adapter" --host 127.0.0.1 "$@"
