"""What each key of a flat TRL config is called in a recipe, and which keys have no place there.

The flat files are those of `trl sft --config`, the alignment handbook and open-r1: TRL's ScriptArguments, ModelConfig and SFTConfig in
one mapping, plus a few keys of each project. `migrate` applies these rules.
"""

from __future__ import annotations

import re
from typing import Any

from recipes_lib.recipe.constraints import NOT_IN_RECIPES
from recipes_lib.recipe.renames import RENAMES
from recipes_lib.recipe.vocabulary import FLAT_NAMES

# A key that only moves, or moves under another name; what was renamed upstream stands in `renames`.
MOVES: dict[str, str] = {
    **FLAT_NAMES,
    **{old: rename.new for old, rename in RENAMES.items() if rename.new},
    "model_init_kwargs": "model.kwargs",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_config_name": "data.subset",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "max_train_samples": "data.max_examples",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_parameters": "lora.target_parameters",
    "load_in_4bit": "quantization.load_in_4bit",
    "load_in_8bit": "quantization.load_in_8bit",
    "bnb_4bit_use_double_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype": "quantization.bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage": "quantization.bnb_4bit_quant_storage",
    "preprocessing_num_workers": "train.dataset_num_proc",
    "use_liger": "train.use_liger_kernel",
    "num_processes": "launch.gpus",
    "num_machines": "launch.nodes",
}

# A key without effect here: left out, and said.
WITHOUT_EFFECT: dict[str, str] = {
    **{old: f"gone from {rename.since}; {rename.note}".rstrip("; ") for old, rename in RENAMES.items() if not rename.new},
    "do_train": "training is what a recipe does",
    "do_eval": "train.eval_strategy says it",
    "do_predict": "recipes eval does it",
    "use_peft": "the lora section says it",
    "lora_task_type": "it is always CAUSAL_LM",
    "remove_unused_columns": "columns are prepared before the trainer sees them",
    "dataset_kwargs": "columns are prepared before the trainer sees them",
    "ignore_bias_buffers": "the trainer decides it",
    "config": "it named this file",
}

# A key with an effect that a recipe cannot express: kept as a comment, and named.
NOT_CARRIED: dict[str, str] = {
    **NOT_IN_RECIPES["train"],
    "dataset_test_split": "validation rows are held out of the training rows (data.split), not read from another split",
    "dataset_streaming": "the audit before step 1 reads every row, so rows are not streamed",
    "dataset_splits": "one split is read (data.source_split); validation rows are held out of it (data.split)",
    "dataset_configs": "each source of a mixture has its own subset",
    "tokenizer_name_or_path": "the tokenizer is the model's",
    "tokenizer": "the tokenizer is the model's",
    "env": "set environment variables where you launch",
}

_OTHER_TRAINERS = """
    beta disable_dropout discopop_tau f_alpha_divergence_coef f_divergence_type label_smoothing ld_alpha loss_weights rpo_alpha
    precompute_ref_batch_size precompute_ref_log_probs ref_model_mixup_alpha ref_model_sync_steps sync_ref_model use_weighting
    reference_free desirable_weight undesirable_weight
    center_rewards_coefficient simpo_gamma cpo_alpha max_prompt_length generate_during_eval
    reward_funcs reward_weights reward_clip_range reward_model_path reward_model_name_or_path scale_rewards normalize_advantages
    num_generations num_generations_eval num_iterations generation_batch_size steps_per_generation generation_kwargs max_completion_length
    max_tool_calling_iterations mask_truncated_completions num_completions_to_print log_completions log_completions_hub_repo
    log_unique_prompts log_multimodal repetition_penalty temperature top_k top_p min_p cache_implementation ds3_gather_for_generation
    delta epsilon epsilon_high entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target use_adaptive_entropy
    importance_sampling_level multi_objective_aggregation off_policy_mask_threshold top_entropy_quantile use_bias_correction_kl
    sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos cast_lm_head_to_fp32
    teacher_model_name_or_path teacher_model_init_kwargs teacher_model_revision use_vllm use_transformers_paged
    use_transformers_continuous_batching transformers_continuous_batching_config
    vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode
    vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex
    vllm_tensor_parallel_size
"""
OTHER_TRAINERS = frozenset(_OTHER_TRAINERS.split())
"""Keys of TRL's other trainers (DPO, KTO, ORPO, reward models, GRPO, distillation) that SFT's has not: a recipe cannot describe them."""

_OTHER_LOSSES = """
    sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_pair aot_unpaired discopop apo_zero apo_down
    apo_zero_unpaired kto kto_pair simpo alphapo sft grpo bnpo dr_grpo dapo cispo luspo sapo vespo
"""
OTHER_LOSSES = frozenset(_OTHER_LOSSES.split())
"""Values of `loss_type` of those trainers."""

OTHER_TRAINING = re.compile(
    r"(?<![a-z0-9])(dpo|ipo|kto|orpo|cpo|simpo|grpo|rloo|ppo|gkd|rm|reward(?:[-_]?model)?)(?![a-z0-9])", re.IGNORECASE
)
"""What the name of such a run says, where no key does: a reward model's config may have SFT's keys alone."""

ACCELERATE_NAMES = {"single_gpu": "single_gpu", "multi_gpu": "ddp", "ddp": "ddp", "fsdp": "fsdp", "fsdp1": "fsdp", "fsdp2": "fsdp"}
"""TRL's bundled accelerate configs -> ours."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
"""TRL's defaults where PEFT's are others. Source: trl.ModelConfig."""

STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")


def dtype_name(value: Any) -> Any:
    """Return the full name of a dtype: bf16 -> bfloat16, torch.float16 -> float16."""
    return DTYPES.get(value.removeprefix("torch."), value.removeprefix("torch.")) if isinstance(value, str) else value


def target_modules(value: Any) -> Any:
    """Return LoRA's target modules as PEFT takes them: a list of names, or the word all-linear.

    Example:
        >>> target_modules("q_proj, v_proj"), target_modules(["all-linear"])
        (['q_proj', 'v_proj'], 'all-linear')
    """
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return "all-linear" if names == ["all-linear"] else names


def mixture_sources(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Turn a mixture (`dataset_mixer`, `dataset_mixture` or TRL's `datasets`) into entries of `data.source`.

    Returns:
        The entries, and one line for each thing that an entry cannot say.
    """
    lost: list[str] = []
    sources = []
    for item in _mixture_items(value):
        name = item.get("id") or item.get("path")
        files = item.get("data_files")
        if isinstance(files, str) and name in ("json", "csv", "parquet", "arrow", "text", None):
            name, files = files, None
        if not isinstance(name, str):
            lost.append(f"a source without id or path: {item}")
            continue
        entry = {"source": name, "subset": item.get("config", item.get("name")), "source_split": item.get("split")}
        sources.append({key: text for key, text in entry.items() if text is not None})
        share = item.get("weight", item.get("fraction"))
        if share is not None and share != 1:
            lost.append(f"{_shown(item, name)}: {share} of its rows; give a number of rows instead (max_examples)")
        lost.extend(f"{name}: {key} {item[key]!r}" for key in ("data_dir", "data_files") if item.get(key) is not None and files is not None)
    return sources, lost


def _shown(item: dict[str, Any], name: str) -> str:
    """Return a source's name with its split, which tells apart the parts of one data set."""
    return f"{name} ({item['split']})" if item.get("split") else name


def _mixture_items(value: Any) -> list[dict[str, Any]]:
    """Return the sources of a mixture, whichever of the three forms it has."""
    if isinstance(value, dict) and isinstance(value.get("datasets"), list):
        value = value["datasets"]
    elif isinstance(value, dict):
        value = [{"id": name, "weight": share} for name, share in value.items()]
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, dict) else {"id": item} for item in items]
