"""Tiny random models of the architectures that people fine-tune, one entry each; two layers, the
tiny tokenizer's vocabulary.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DENSE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
DENSE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
DENSE |= {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
DENSE |= {"pad_token_id": None}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_MAMBA_SIZES = {"n_heads": 4, "d_head": 32, "n_groups": 1, "d_state": 16, "d_conv": 4}
MAMBA: dict[str, Any] = {f"mamba_{key}": value for key, value in _MAMBA_SIZES.items()}
MAMBA |= {"mamba_expand": 2, "mamba_chunk_size": 16}
ROUTED: dict[str, Any] = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1}
ROUTED |= {"num_experts_per_tok": 2, "topk_group": 1, "n_shared_experts": 1}
ROUTED |= {"first_k_dense_replace": 1}
DEEPSEEK: dict[str, Any] = {**ROUTED, "kv_lora_rank": 16, "q_lora_rank": 24, "head_dim": 8}
DEEPSEEK |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK |= {"num_key_value_heads": 4}
DEEPSEEK_V4: dict[str, Any] = {"num_key_value_heads": 1, "q_lora_rank": 24, "qk_rope_head_dim": 8}
DEEPSEEK_V4 |= {"o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK_V4 |= {"moe_intermediate_size": 32, "index_n_heads": 2, "index_head_dim": 16}
# a router that learns, beside one that looks tokens up
DEEPSEEK_V4 |= {"index_topk": 8, "mlp_layer_types": ["hash_moe", "moe"]}
LINEAR_ATTENTION: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR_ATTENTION |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
LINEAR_ATTENTION |= {"layer_types": ["linear_attention", "full_attention"]}
WINDOWS: dict[str, Any] = {
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}
SHARED = {**EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 32}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA3: dict[str, Any] = {**WINDOWS, "query_pre_attn_scalar": 16}
GEMMA4: dict[str, Any] = {**WINDOWS, "global_head_dim": 32, "hidden_size_per_layer_input": 16}
GEMMA4 |= {"vocab_size_per_layer_input": 520}
LLAMA4: dict[str, Any] = {**LOCAL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
LLAMA4 |= {"interleave_moe_layer_step": 1, "moe_layers": [0, 1], "attention_chunk_size": 256}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
GEMMA4_VISION = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
LLAMA4_VISION = {**VISION, "intermediate_size": 128, "vision_output_dim": 32}
LLAMA4_VISION |= {"projector_input_dim": 32, "projector_output_dim": 32}
QWEN_VISION = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32}
QWEN_VISION |= {"out_hidden_size": 64, "num_position_embeddings": 16}
STATE_SPACE: dict[str, Any] = {"state_size": 16, "n_groups": 1, "chunk_size": 16, "expand": 2}
NEMOTRON: dict[str, Any] = {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4}
NEMOTRON |= {"mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
GRANITE = {"logits_scaling": 2.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}

# their ids, which the tokenizer's texts never have
_IMAGE_TOKENS = {
    "qwen3_5": ("image_token_id", "video_token_id"),
    "gemma3": ("boi_token_index", "eoi_token_index", "image_token_index"),
    "gemma4": tuple(f"{kind}_token_id" for kind in ("boi", "eoi", "image", "audio", "video")),
    "llama4": ("boi_token_index", "eoi_token_index", "image_token_index"),
    "mistral3": ("image_token_index",),
}
ALL_LINEAR = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": ALL_LINEAR},
    "qlora": {
        "lora": ALL_LINEAR,
        "quantization": NF4,
        "model": {"dtype": "bfloat16"},
        "train": {"bf16": True},
    },
    "full": {"lora": None, "train": {"learning_rate": 1.0e-3}},
}
SHORT = {
    "data": {"max_examples": 60},
    "train": {"max_steps": 4, "save_steps": 2, "eval_steps": 4, "lr_scheduler_type": "constant"},
}
# model_type: what its config says beyond DENSE
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_5_text": LINEAR_ATTENTION,
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "smollm3": {"no_rope_layers": [1, 0]},
    "ministral3": {},
    "olmo3": WINDOWS,
    "phi3": {"original_max_position_embeddings": 512},
    "granite": {**GRANITE, "attention_multiplier": 0.25},
    "glm4": {},
    "cohere2": {**WINDOWS, "logit_scale": 0.5},
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 32,
        "block_auto_adjust_ff_dim": False,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_oss": {**WINDOWS, **LOCAL_EXPERTS},
    "llama4_text": LLAMA4,
    "nemotron_h": NEMOTRON,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 32, **STATE_SPACE},
    "granitemoe": {**LOCAL_EXPERTS, "logits_scaling": 2.0},
    "granitemoehybrid": {
        **MAMBA,
        **LOCAL_EXPERTS,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "rope",
    },
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "mixtral": LOCAL_EXPERTS,
    "phimoe": LOCAL_EXPERTS,
    "qwen3_5_moe_text": SHARED,
    "qwen3_next": SHARED,
    "glm4_moe": ROUTED,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v4": DEEPSEEK_V4,
    "laguna": {**EXPERTS, "shared_expert_intermediate_size": 32},
    # smaller ones have a cache of another shape than their state (transformers 5.24)
    "xlstm": {"hidden_size": 128, "num_blocks": 2, "num_heads": 4},
    # as their checkpoints are on the Hub: a language model that reads images
    "qwen3_5": {"text_config": LINEAR_ATTENTION, "vision_config": QWEN_VISION},
    "gemma3": {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma4": {"text_config": {**GEMMA4, "pad_token_id": 0}, "vision_config": GEMMA4_VISION},
    "llama4": {"text_config": LLAMA4, "vision_config": LLAMA4_VISION},
    "mistral3": {
        "text_config": {"model_type": "ministral3"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
    },
}


def family_config(family: str, **changes: Any) -> Any:
    """Return a family's config; changes go to its language model."""
    from transformers import AutoConfig

    values, sizes = FAMILIES.get(family, {}), {"vocab_size": 520, **DENSE}
    if "text_config" not in values:
        return AutoConfig.for_model(family, **{**sizes, **values, **changes})
    tokens = {name: 513 + place for place, name in enumerate(_IMAGE_TOKENS[family])}
    text = {**sizes, **values["text_config"], **changes}
    return AutoConfig.for_model(family, **{**values, **tokens, "text_config": text})


def build_family(
    family: str, folder: Path, tokenizer_from: Path, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny model of a family with the tokenizer of another folder; the same seed gives the
    same bytes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    reads_images = "vision_config" in FAMILIES.get(family, {})
    loader = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = loader.from_config(family_config(family, **changes))
    model.save_pretrained(folder)
    for file in tokenizer_from.iterdir():
        if file.name.startswith("tokenizer") or file.name == "chat_template.jinja":
            shutil.copyfile(file, folder / file.name)
    return folder


def write_family_recipe(path: Path, tiny_recipe: str, *changes: dict[str, Any]) -> Path:
    """Write a recipe of four steps with a method of METHODS, or other changes of its sections."""
    values = yaml.safe_load(tiny_recipe)
    for section, keys in (item for change in (SHORT, *changes) for item in change.items()):
        values[section] = keys and {**(values.get(section) or {}), **keys}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


CHOICE_TASK = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WORDS_TASK = """
task: tiny_words
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
BOTH_TASKS = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
num_fewshot: 0
doc_to_text: "{{question}}:"
metadata: {version: 1.0}
"""
OWN_EVALS = {
    "tiny_choice": CHOICE_TASK + BOTH_TASKS,
    "tiny_words": WORDS_TASK + BOTH_TASKS,
    "lm_eval": "suite: {name: lm_eval, tasks: [tiny_choice, tiny_words], batch_size: 4}\ndata:"
    " {include_path: ., folder: .}\ngeneration: {dtype: float32, trust_remote_code: true}\n",
    "checks": "suite: {name: checks}\ndata: {questions: questions.jsonl}\ngeneration:"
    " {max_new_tokens: 6}\n",
    "heldout_loss": "suite: {name: heldout_loss}\ndata: {questions: validation}\n",
}


def write_own_evals(folder: Path) -> list[Path]:
    """Write eval recipes of the suites without a judge: lm_eval with one task that compares choices
    and one that generates, for prompts of several lengths; checks; heldout_loss.
    """
    rows = [{"question": f"Pick {'one of these ' * n}{n}", "answer": n % 2} for n in range(4)]
    lines = [json.dumps({**row, "choices": ["one", "two three"]}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    question = {"prompt": "Name a metal.", "check": "contains", "expected": "gold"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    for name, text in OWN_EVALS.items():
        (folder / f"{name}.yaml").write_text(text)
    return [folder / f"{name}.yaml" for name in ("lm_eval", "checks", "heldout_loss")]


def asked_to_stop(step: int, honest: Callable[..., Any]) -> Callable[..., Any]:
    """Return `RunCallback.on_step_end` that asks for a stop after a step."""

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            self.stop.requested = 1
        return honest(self, args, state, control, **kwargs)

    return on_step_end
