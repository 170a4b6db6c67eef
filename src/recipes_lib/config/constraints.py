"""Our tables about upstream's keys: what we tighten, and what a recipe may not contain because the
project owns it.

Upstream's classes accept values that cannot work (`max_length: -5`, `learning_rate: .inf`); the
schema refuses them here, before anything is downloaded. Read by `schema` (generation) and
`validation`.
"""

from __future__ import annotations

from recipes_lib.config.json_schema import JsonSchema

_AT_LEAST_1: JsonSchema = {"minimum": 1}
_NOT_NEGATIVE: JsonSchema = {"minimum": 0}
_POSITIVE: JsonSchema = {"exclusiveMinimum": 0}
_PROBABILITY: JsonSchema = {"minimum": 0, "exclusiveMaximum": 1}
_DTYPES: JsonSchema = {"enum": ["float32", "bfloat16", "float16"]}
_CHECKPOINTING: JsonSchema = {
    "type": ["object", "null"],
    "additionalProperties": False,
    "properties": {
        "use_reentrant": {"type": "boolean"},
        "preserve_rng_state": {"type": "boolean"},
        "determinism_check": {"type": "string", "enum": ["default", "none"]},
        "early_stop": {"type": "boolean"},
        "every_n_layers": {"type": "integer", "minimum": 1},
        "offload": {"type": "boolean"},
        "selective": {"type": "boolean"},  # TRL's
    },
}
VARLEN = "varlen"
# Values of `lora.init_lora_weights` whose adapters start from random numbers or zeros, and not from
# the weights of the base.
STARTS_WITHOUT_WEIGHTS = (True, False, "gaussian", "orthogonal")
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_FLASH = "flash_attention_2 flash_attention_3 flash_attention_4"
_KERNELS = f"sdpa eager {VARLEN} {_FLASH} flex_attention"
_ATTENTION: JsonSchema = {
    "anyOf": [
        {"enum": _KERNELS.split()},
        {
            "type": "string",
            "pattern": "^[^/]+/[^/]+$",
            "title": "a kernel's name on the Hub (kernels-community/NAME)",
        },
        {"type": "null"},
    ]
}
_COLUMN_NAMES = (
    "id instruction context response category prompt completion text messages system tools"
    " chat_template_kwargs"
)
_COLUMNS: JsonSchema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {"type": "string"} for name in _COLUMN_NAMES.split()},
}
_MIXTURE_PART: JsonSchema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["source"],
    "properties": {
        **{key: {"type": "string"} for key in ("source", "source_split", "encoding")},
        **{key: {"type": ["string", "null"]} for key in ("subset", "revision", "delimiter")},
        "columns": _COLUMNS,
        "max_examples": {"type": ["integer", "null"], "minimum": 1},
        "weight": {"type": "number", "exclusiveMinimum": 0},
    },
}

_COUNTS = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length
    save_total_limit eval_accumulation_steps torch_empty_cache_steps dataset_num_proc
    dataloader_prefetch_factor
"""
_AMOUNTS = "learning_rate num_train_epochs adam_epsilon logging_steps eval_steps save_steps"
_AMOUNTS_OR_0 = """
    warmup_steps weight_decay max_grad_norm eval_delay neftune_noise_alpha dataloader_num_workers
    seed data_seed router_aux_loss_coef
"""
_STARTS = "gaussian eva olora pissa corda loftq orthogonal mica"

# section -> key -> JSON Schema words that are added to what upstream's annotation says (they win).
TIGHTENINGS: dict[str, dict[str, JsonSchema]] = {
    "model": {"attn_implementation": _ATTENTION},
    "train": {
        **dict.fromkeys(_COUNTS.split(), _AT_LEAST_1),
        **dict.fromkeys(_AMOUNTS.split(), _POSITIVE),
        **dict.fromkeys(_AMOUNTS_OR_0.split(), _NOT_NEGATIVE),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _PROBABILITY),
        "max_steps": {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}]},
        "include_num_input_tokens_seen": {"enum": [True, False, "all", "non_padding", "no"]},
        # true hides the step on which the loss stopped being a number
        "logging_nan_inf_filter": {"enum": [False]},
        "activation_checkpointing_kwargs": _CHECKPOINTING,
        "metric_for_best_model": {"type": ["string", "null"]},
    },
    "lora": {
        "task_type": {"enum": ["CAUSAL_LM"]},
        "r": _AT_LEAST_1,
        "lora_alpha": _AT_LEAST_1,
        "lora_dropout": _PROBABILITY,
        "init_lora_weights": {
            "anyOf": [
                {"type": "boolean"},
                {"enum": _STARTS.split()},
                {"type": "string", "pattern": "^pissa_niter_[0-9]+$"},
            ]
        },
    },
    "quantization": {
        "bnb_4bit_compute_dtype": _DTYPES,
        "bnb_4bit_quant_type": {"enum": ["fp4", "nf4"]},
        "bnb_4bit_quant_storage": {
            "enum": ["uint8", "int8", "float16", "bfloat16", "float32", "float64"]
        },
    },
    "data": {
        "source": {
            "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _MIXTURE_PART}]
        },
        "columns": _COLUMNS,
        "split": {"properties": {"validation": _PROBABILITY, "test": _PROBABILITY}},
        "max_unsupervised_fraction": {"minimum": 0, "maximum": 1},
    },
}

# Arguments of `from_pretrained` that are not for model.kwargs -> where they are said instead.
NOT_IN_MODEL_KWARGS: dict[str, str] = {
    **{
        key: f"write model.{key}"
        for key in ("dtype", "attn_implementation", "trust_remote_code", "revision")
    },
    "torch_dtype": "write model.dtype",
    "quantization_config": "write a quantization section",
    "device_map": "the launcher decides where the model lies",
    "use_safetensors": "safetensors are always read",
}

_LAUNCHER = "the launcher and its accelerate config decide it; see launch.accelerate"
_ADAPTER_RECORD = "PEFT writes it into the saved adapter by itself"

# section -> key -> why it is not a recipe's business, or what to write instead.
NOT_IN_RECIPES: dict[str, dict[str, str]] = {
    "train": {
        "output_dir": "the run directory is runs/<run.name>; set run.name",
        "run_name": "set run.name",
        "resume_from_checkpoint": (
            "the same command resumes from the newest complete checkpoint by itself"
        ),
        "do_train": "recipes train always trains",
        "do_eval": "set train.eval_strategy",
        "do_predict": "evaluation has its own verb: recipes eval",
        "hub_token": "log in with 'hf auth login'; a token never belongs in a file",
        "model_init_kwargs": "use model.kwargs",
        "trust_remote_code": (
            "use model.trust_remote_code, and --trust-remote-code on the command line"
        ),
        "chat_template_path": "use data.chat_template",
        "dataset_text_field": "use data.columns: {text: NAME}",
        "dataset_kwargs": "rows are tokenised and masked by recipes_lib.data",
        "enable_jit_checkpoint": (
            "runs stop safely on SIGTERM by themselves; upstream's version leaves a half-trained"
            " model"
        ),
        "local_rank": _LAUNCHER,
        "fsdp": _LAUNCHER,
        "fsdp_config": _LAUNCHER,
        "deepspeed": "DeepSpeed is not supported; use launch.accelerate: fsdp",
        "parallelism_config": _LAUNCHER,
        "ignore_data_skip": "a resumed run sees the rows it would have seen",
        "auto_find_batch_size": "it would change the examples per step behind the recipe's back",
    },
    "lora": {
        "peft_type": "it is always LORA",
        "auto_mapping": _ADAPTER_RECORD,
        "peft_version": _ADAPTER_RECORD,
        "base_model_name_or_path": _ADAPTER_RECORD,
        "revision": _ADAPTER_RECORD,
        "inference_mode": "an adapter in training is never in inference mode",
        "megatron_config": "Megatron is not supported",
        "megatron_core": "Megatron is not supported",
    },
    "quantization": {},
}
