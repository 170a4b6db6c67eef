#!/usr/bin/env bash
# Serve a model or a run with vLLM, which pins its own torch and transformers and therefore lives in an environment of its own:
#   python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm
#   VLLM=~/vllm/bin/vllm launch/vllm_server.sh prometheus-eval/prometheus-7b-v2.0     # a judge
#   VLLM=~/vllm/bin/vllm launch/vllm_server.sh runs/my-run                            # a run: merged/ or model/ if there, else its adapter
# Further words go to `vllm serve` (--port 8001, --tensor-parallel-size 2). A merged model is about a third faster than an adapter.
set -euo pipefail
[ $# -ge 1 ] || { grep '^#' "$0" | sed '1d; s/^# \{0,1\}//' >&2; exit 2; }
target=${1%/}; shift
vllm=${VLLM:-vllm}
command -v "$vllm" >/dev/null || { echo "vllm_server: '$vllm' not found; set VLLM to the vllm of its own environment" >&2; exit 5; }

if [ ! -f "$target/run.json" ]; then
    exec "$vllm" serve "$target" --served-model-name "$target" "$@"
fi
name=$(basename "$target")
for weights in "$target/merged" "$target/model"; do
    [ -f "$weights/config.json" ] && exec "$vllm" serve "$weights" --served-model-name "$name" "$@"
done
adapter=$target/adapter/adapter_config.json
[ -f "$adapter" ] || { echo "vllm_server: $target has no merged/, model/ or adapter/" >&2; exit 2; }
read -r base rank < <(python3 -c 'import json, sys; c = json.load(open(sys.argv[1])); print(c["base_model_name_or_path"], max([c["r"], *c.get("rank_pattern", {}).values()]))' "$adapter")
for limit in 8 16 32 64 128 256 320 512; do [ "$limit" -ge "$rank" ] && break; done   # the values vLLM knows; its default is 16
exec "$vllm" serve "$base" --served-model-name "$base" --enable-lora --max-lora-rank "$limit" --lora-modules "$name=$target/adapter" "$@"
