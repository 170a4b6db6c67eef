"""The sections `train`, of each stage, and `lora`: TRL's and PEFT's own classes, as `make schema`
wrote them to `upstream.json`, so that `check` needs no torch. `upstream.py` builds the objects.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, create_model, model_validator

from recipes_lib.config.documents import Values
from recipes_lib.config.parsing import Section

UPSTREAM_FILE = Path(__file__).with_name("upstream.json")
CLASSES = {"train": "trl.SFTConfig", "lora": "peft.LoraConfig"}
PREFERENCE_CLASS = "trl.DPOConfig"  # behind `train` in stage dpo
# Project defaults for `train` that differ from TRL's; none changes the declared mathematics.
TRAIN_DEFAULTS = {
    # recomputing activations costs speed (about 20% by TRL's figure)
    "activation_checkpointing": False,
    # upstream replaces a NaN loss by an earlier mean, so that a broken run looks fine
    "logging_nan_inf_filter": False,
    # a LoRA step uses every trainable parameter; searching for unused ones costs time
    "ddp_find_unused_parameters": False,
}
# Old key of `train` -> the key since TRL 1 and transformers 5.
RENAMES = {
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_RENAMED = "renamed to train.{} in TRL 1 / transformers 5; for a whole old file: recipes migrate"
_OWN_LOADER = "this project's own data loader decides it"
_OWN_EVALUATION = "validation is this project's own: the loss of every token, in train.bf16 or fp16"
# Keys that upstream would take, and that the trainer of this project never asks for.
_WITHOUT_EFFECT = {
    "dataloader_drop_last": _OWN_LOADER,
    "dataloader_multiprocessing_context": _OWN_LOADER,
    "dataloader_in_order": _OWN_LOADER,
    "length_column_name": "lengths are those of the prepared rows",
    "eval_packing": _OWN_EVALUATION,
    "bf16_full_eval": _OWN_EVALUATION,
    "fp16_full_eval": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "prediction_loss_only": _OWN_EVALUATION,
}
_OWN_REFERENCE = "the reference is the base before the first step, read once and kept in the run"
# The same of stage dpo, beside those.
_WITHOUT_EFFECT_ON_PAIRS = {
    "precompute_ref_log_probs": _OWN_REFERENCE,
    "precompute_ref_batch_size": _OWN_REFERENCE,
    "sync_ref_model": _OWN_REFERENCE,
    "ref_model_mixup_alpha": _OWN_REFERENCE,
    "ref_model_sync_steps": _OWN_REFERENCE,
    "ld_alpha": f"it weighs the tokens of an answer, and is not in a sum: {_OWN_REFERENCE}",
    "neftune_noise_alpha": f"the noise would stand in one half of each log-ratio: {_OWN_REFERENCE}",
    "padding_free": "DPOTrainer (TRL 1.16) does not have it",
    "use_liger_kernel": "DPOTrainer (TRL 1.16) has a fused head of its own",
    "liger_kernel_config": "DPOTrainer (TRL 1.16) has a fused head of its own",
    "truncation_mode": "an answer that is too long loses its end, so that both have one prompt",
    "label_smoothing_factor": "it smooths tokens; train.label_smoothing is that of pairs",
    "average_tokens_across_devices": "the loss is a mean over pairs",
}
# Key of `train` -> its value that TRL 2.0 removes (any, if None), and what to write instead: the
# deprecation warnings of TRL 1.16.
GOING_IN_TRL_2: dict[str, tuple[object, str]] = {
    "use_liger_kernel": (True, "set model.use_kernels: true"),
    "truncation_mode": ("keep_end", "leave the key out: rows keep their start"),
    "loss_type": ("chunked_nll", "set train.loss_type: nll, which is the same"),
    "pad_token": (None, "leave the key out: the tokenizer's padding token is taken"),
}
_OF_SFT = f"{PREFERENCE_CLASS} has no such key: it acts in stage sft; null drops that of a base"
_OF_DPO = "it acts in preference tuning, on rows of chosen and rejected answers: set stage: dpo"
# Losses whose mean over the global batch is not the mean over its micro-batches.
OF_MICRO_BATCHES = ("aot", "aot_unpaired", "sft")
# Losses of scores, which the divergence makes of the log-ratios; the others take those themselves.
_OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
# Key of `train` in stage dpo -> the key that decides whether it acts, and the values with which.
ACTS_WITH = {
    "label_smoothing": ("loss_type", ("robust", "exo_pair")),
    "discopop_tau": ("loss_type", ("discopop",)),
    "f_divergence_type": ("loss_type", _OF_SCORES),
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
}
# What no recipe sets, by the beginning of its name, and why.
_NOT_OURS = {
    "train": (
        "(output_dir|run_name|resume_|local_rank|save_only|do_|ignore_data|auto_find|fsdp|deepspeed"
        "|parallelism|accelerator_|model_init|trust_|chat_template|dataset_(text|kwargs)|enable_jit"
        "|push_to_hub|hub_)",
        "the sections model, data, run and launch (accelerate: fsdp) or recipes export decide it",
    ),
    "lora": (
        r"(base_model|peft_|auto_mapping|revision|inference_|use_bdlora|megatron_|\w+_config$)",
        "PEFT sets it itself, or it belongs to a LoRA variant with its own config",
    ),
}

_AtLeast1 = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other
_STARTS = "^(gaussian|orthogonal|olora|pissa)$"
# Types that are narrower than upstream's annotation: what it accepts and cannot work with.
_NARROWER: dict[str, dict[str, object]] = {
    "train": {
        "per_device_train_batch_size": _AtLeast1,
        "per_device_eval_batch_size": _AtLeast1,
        "gradient_accumulation_steps": _AtLeast1,
        "dataloader_num_workers": Annotated[int, Field(ge=0, le=64)],
        "learning_rate": Annotated[float, Field(gt=0, le=100)],  # at 1e38 a step leaves float32
        "neftune_noise_alpha": _NotNegative | None,
        **dict.fromkeys(("max_length", "save_total_limit"), _AtLeast1 | None),
        **dict.fromkeys(("num_train_epochs", "save_steps"), _Positive),
        # a negative one turns gradients round, or lets weights grow
        **dict.fromkeys(("max_grad_norm", "weight_decay", "adam_epsilon"), _NotNegative),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)]),
        # "best" leaves a killed run without a checkpoint to go on from
        "save_strategy": Literal["no", "steps", "epoch"],
        "seed": _Seed,
        "data_seed": _Seed | None,
        # a validation measures the loss alone
        "metric_for_best_model": Literal["loss", "eval_loss"] | None,
        # batch_rebalance deals out the rows of a step by the number of processes
        "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
        # true hides the step on which the loss stopped being a number
        "logging_nan_inf_filter": Literal[False],
    },
    "dpo": {  # beside those of `train`
        "beta": _Positive,
        "label_smoothing": Annotated[float, Field(ge=0, lt=0.5)],
        "discopop_tau": _Positive,
        "loss_type": _Loss | Annotated[list[_Loss], Field(min_length=1)],
        "loss_weights": list[_Positive] | None,  # a negative one prefers what was rejected
        "f_divergence_type": Literal[
            "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"
        ],
    },
    "lora": {
        "task_type": Literal["CAUSAL_LM"],
        **dict.fromkeys(("r", "lora_alpha"), _AtLeast1),
        # eva, corda, loftq and others need a config and rows of their own; pissa_niter changes the
        # base by random numbers, by others at each loading
        "init_lora_weights": bool | Annotated[str, Field(pattern=_STARTS)],
    },
}


class _Described(Section):
    model_config = ConfigDict(use_attribute_docstrings=False)  # looking for texts takes 15 ms

    @classmethod
    def without_dropped(cls, values: Any) -> Any:
        """Leave out what cannot be set here and is null: so a recipe drops a key of its base."""
        if not isinstance(values, dict):
            return values
        dropped = {key for key, value in values.items() if value is None and key in cls.gone}
        return {key: value for key, value in values.items() if key not in dropped}

    _drop = model_validator(mode="before")(without_dropped)


def _section(name: str, fields: dict[str, Values], gone: dict[str, str]) -> type[Section]:
    """Return the model of a section, `gone` being the keys that cannot be set and why; its types
    are text, which pydantic reads.
    """
    pattern, why = _NOT_OURS[name]
    gone = {key: why for key in fields if re.match(pattern, key)} | gone
    narrower = _NARROWER[name]
    if fields.get("beta"):
        narrower = narrower | _NARROWER["dpo"]
    keys: dict[str, object] = {}
    for key, field in fields.items():
        if key not in gone:
            default = field.get("default")
            if name == "train":
                default = TRAIN_DEFAULTS.get(key, default)
            type_of_key = narrower.get(key, field["type"])
            keys[key] = (type_of_key, Field(default, description=field["description"]))
    title = f"{name.capitalize()}Section"
    model = create_model(title, __base__=_Described, __module__=__name__, **keys)  # type: ignore[call-overload]
    model.__doc__ = f"`{CLASSES[name]}`, key by key."
    model.gone = gone
    return model


@cache
def preference_section() -> type[Section]:
    """Return the section `train` of stage dpo; made where it is needed, which takes 25 ms."""
    fields = {key: field for key, field in (_FIELDS["train"] | _FIELDS["dpo"]).items() if field}
    of_sft = {key: _OF_SFT for key, field in _FIELDS["dpo"].items() if field is None}
    model = _section("train", fields, _RENAMED_KEYS | of_sft | _WITHOUT_EFFECT_ON_PAIRS)
    model.__doc__ = f"`{PREFERENCE_CLASS}`, key by key."
    model.__name__ = model.__qualname__ = "PreferenceSection"
    return model


_FIELDS = json.loads(UPSTREAM_FILE.read_text("utf-8"))
_RENAMED_KEYS = _WITHOUT_EFFECT | {old: _RENAMED.format(new) for old, new in RENAMES.items()}
if TYPE_CHECKING:
    TrainSection = _Described
    LoraSection = Section
else:
    _of_dpo = {
        key: _WITHOUT_EFFECT_ON_PAIRS.get(key, _OF_DPO)
        for key in _FIELDS["dpo"].keys() - _FIELDS["train"].keys()
    }
    TrainSection = _section("train", _FIELDS["train"], _RENAMED_KEYS | _of_dpo)
    LoraSection = _section("lora", _FIELDS["lora"], {})
