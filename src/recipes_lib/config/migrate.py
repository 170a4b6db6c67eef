"""A flat TRL config (alignment handbook, open-r1, `trl sft --config`) -> a recipe, comments kept,
every change listed.

The flat files are TRL's ScriptArguments, ModelConfig and SFTConfig in one mapping, plus a few keys
of each project. First the tables say what each key is called in a recipe; then `migrate` decides
what becomes of each key; last comes the text: keys move as they were written, so comments, number
formats and long templates stay, and only a value that must change is written anew. Nothing is
loaded or downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.constraints import NOT_IN_RECIPES
from recipes_lib.config.kinds import SECTIONS, foreign_kind
from recipes_lib.config.vocabulary import FLAT_NAMES, RENAMES, SHORT_DTYPES, section_keys
from recipes_lib.config.yaml_source import read_yaml
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import check_run_name
from recipes_lib.core.redaction import is_secret_name

# A key that only moves, or moves under another name; what was renamed upstream stands in `renames`.
MOVES: dict[str, str] = {
    **FLAT_NAMES,
    **{old: rename.new for old, rename in RENAMES.items() if rename.new},
    "model_init_kwargs": "model.kwargs",
    "dataset_config_name": "data.subset",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "system_prompt": "data.system_prompt",
    "max_train_samples": "data.max_examples",
    "bnb_4bit_use_double_quant": "quantization.bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype": "quantization.bnb_4bit_compute_dtype",
    "preprocessing_num_workers": "train.dataset_num_proc",
    "use_liger": "train.use_liger_kernel",
    "num_processes": "launch.gpus",
    "num_machines": "launch.nodes",
}

# A key without effect here: left out, and said.
WITHOUT_EFFECT: dict[str, str] = {
    **{
        old: f"gone from {rename.since}; {rename.note}".rstrip("; ")
        for old, rename in RENAMES.items()
        if not rename.new
    },
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
    "dataset_test_split": (
        "validation rows are held out of the training rows (data.split), not read from another"
        " split"
    ),
    "dataset_streaming": "the audit before step 1 reads every row, so rows are not streamed",
    "dataset_splits": (
        "one split is read (data.source_split); validation rows are held out of it (data.split)"
    ),
    "dataset_configs": "each source of a mixture has its own subset",
    "tokenizer_name_or_path": "the tokenizer is the model's",
    "tokenizer": "the tokenizer is the model's",
    "env": "set environment variables where you launch",
}

_OTHER_TRAINERS = """
    beta disable_dropout discopop_tau f_alpha_divergence_coef f_divergence_type label_smoothing
    ld_alpha loss_weights rpo_alpha precompute_ref_batch_size precompute_ref_log_probs
    ref_model_mixup_alpha ref_model_sync_steps sync_ref_model use_weighting
    reference_free desirable_weight undesirable_weight
    center_rewards_coefficient simpo_gamma cpo_alpha max_prompt_length generate_during_eval
    reward_funcs reward_weights reward_clip_range reward_model_path reward_model_name_or_path
    scale_rewards normalize_advantages num_generations num_generations_eval num_iterations
    generation_batch_size steps_per_generation generation_kwargs max_completion_length
    max_tool_calling_iterations mask_truncated_completions num_completions_to_print log_completions log_completions_hub_repo
    log_unique_prompts log_multimodal repetition_penalty temperature top_k top_p min_p
    cache_implementation ds3_gather_for_generation delta epsilon epsilon_high entropy_coef
    entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target use_adaptive_entropy
    importance_sampling_level multi_objective_aggregation off_policy_mask_threshold top_entropy_quantile use_bias_correction_kl
    sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg
    vespo_lambda_pos cast_lm_head_to_fp32
    teacher_model_name_or_path teacher_model_init_kwargs teacher_model_revision use_vllm use_transformers_paged
    use_transformers_continuous_batching transformers_continuous_batching_config
    vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode
    vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_structured_outputs_regex
    vllm_tensor_parallel_size
"""  # noqa: E501
OTHER_TRAINERS = frozenset(_OTHER_TRAINERS.split())
"""Keys of TRL's other trainers (DPO, KTO, ORPO, reward models, GRPO, distillation) that SFT's has
not: a recipe cannot describe them.
"""

_OTHER_LOSSES = """
    sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_pair
    aot_unpaired discopop apo_zero apo_down apo_zero_unpaired kto kto_pair simpo alphapo sft grpo
    bnpo dr_grpo dapo cispo luspo sapo vespo
"""
OTHER_LOSSES = frozenset(_OTHER_LOSSES.split())
"""Values of `loss_type` of those trainers."""

OTHER_TRAINING = re.compile(
    r"(?<![a-z0-9])(dpo|ipo|kto|orpo|cpo|simpo|grpo|rloo|ppo|gkd|rm|reward(?:[-_]?model)?)(?![a-z0-9])",
    re.IGNORECASE,
)
"""What the name of such a run says, where no key does: a reward model's config may have SFT's keys
alone.
"""

ACCELERATE_NAMES = {
    "single_gpu": "single_gpu",
    "multi_gpu": "ddp",
    "ddp": "ddp",
    "fsdp": "fsdp",
    "fsdp1": "fsdp",
    "fsdp2": "fsdp",
}
"""TRL's bundled accelerate configs -> ours."""

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
"""TRL's defaults where PEFT's are others. Source: trl.ModelConfig."""

OF_CONVERSATIONS = ("data.chat_template", "data.system_prompt")
NAMES_OF_DATA = {"dataset_name", "dataset_mixer", "dataset_mixture", "datasets"}
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")


def migrate(path: Path, head: str, rejected: Mapping[str, str]) -> Migration:
    """Turn a flat TRL config into a recipe; `text()` of the result is the recipe.

    Args:
        head: the recipe's first line.
        rejected: flat keys whose values the check refuses -> why; they become comments.

    Raises:
        RecipeError: the file is not YAML, is a recipe already, is no supervised fine-tuning config,
            or names no model or data.
    """
    source = read_yaml(path, str(path))
    if not isinstance(source.values, dict) or not source.values:
        raise RecipeError("is not a flat TRL config: it holds no keys", file=path)
    _refuse_other_kinds(source.values, source.lines, path)
    entries, comments_below = cut_into_entries(source.text, source.values)
    migration = Migration(str(path), entries)
    migration.header = [head]
    first = next(iter(migration.entries.values()))
    migration.header += [line for line in first.comments_above if line]
    first.comments_above = []
    for entry in migration.entries.values():
        _place(migration, entry, rejected)
    _complete(migration)
    migration.waiting_comments += comments_below
    return migration


def keys_behind(
    errors: Sequence[RecipeError], migration: Migration, lines: Mapping[tuple[str | int, ...], int]
) -> set[str]:
    """Return the flat keys whose values the errors are about.

    Args:
        lines: the written recipe's key paths and their lines.
    """
    keys = set()
    for error in errors:
        last = error.line or 0
        above = [(at, path) for path, at in lines.items() if len(path) >= 2 and at <= last]
        if above:
            section, key = max(above)[1][:2]
            keys.add(migration.origins.get(f"{section}.{key}", ""))
    return keys - {"", "model_name_or_path", *NAMES_OF_DATA}


def _refuse_other_kinds(values: dict[str, Any], lines: dict[Any, int], path: Path) -> None:
    """Raise for what is not a flat supervised fine-tuning config."""

    def refuse(what: str, *hints: str, key: str = "") -> RecipeError:
        return RecipeError(what, *hints, file=path, line=lines.get((key,)))

    if foreign := foreign_kind(values):
        raise refuse(f"is {foreign.title}, not a flat TRL config", foreign.use)
    if {"model", "data", "train", "extends"} & values.keys():
        raise refuse("is a recipe already", f"check it: recipes check {path}")
    others = sorted(OTHER_TRAINERS & values.keys(), key=lambda key: lines.get((key,), 0))
    loss = values.get("loss_type")
    if isinstance(loss, list) or (isinstance(loss, str) and loss in OTHER_LOSSES):
        others.append("loss_type")
    if others:
        what = (
            f"'{others[0]}' belongs to preference tuning, reward models or reinforcement learning,"
            " which recipes do not describe"
        )
        raise refuse(what, "use TRL's own trainer for it", key=others[0])
    for key in ("output_dir", "run_name", "hub_model_id"):
        if named := OTHER_TRAINING.search(str(values.get(key, ""))):
            what = f"'{key}' says {named[1]}, and a recipe describes supervised fine-tuning alone"
            hint = (
                f"use TRL's own trainer for {named[1]}; if this is supervised fine-tuning, give it"
                f" another {key} and run this again"
            )
            raise refuse(what, hint, key=key)
    if "model_name_or_path" not in values:
        raise refuse("is not a flat TRL config: it has no model_name_or_path")
    if not NAMES_OF_DATA & values.keys():
        raise refuse(
            "names no data: dataset_name, dataset_mixture or dataset_mixer",
            "add dataset_name: and run this again",
        )


def _place(migration: Migration, entry: Entry, rejected: Mapping[str, str]) -> None:
    """Decide what becomes of one key."""
    key = entry.key
    if key in rejected:
        migration.leave(entry, rejected[key])
    elif is_secret_name(key):
        why = "a secret does not belong in a recipe; use hf auth login or the tool's own login"
        migration.leave(entry, why)
    elif key in _SPECIAL:
        _SPECIAL[key](migration, entry)
    elif key in WITHOUT_EFFECT:
        migration.drop(entry, WITHOUT_EFFECT[key])
    elif MOVES.get(key) in OF_CONVERSATIONS and "dataset_text_field" in migration.entries:
        why = (
            "it acts on conversations alone, and dataset_text_field says that each row is one text"
        )
        migration.leave(entry, why)
    elif MOVES.get(key, "").startswith("lora.") and not migration.value("use_peft"):
        migration.leave(entry, "without use_peft: true TRL ignores it and trains all weights")
    elif key in MOVES:
        _move(migration, entry, MOVES[key])
    elif key in NOT_CARRIED:
        migration.leave(entry, NOT_CARRIED[key])
    elif key in section_keys("train"):
        _move(migration, entry, f"train.{key}")
    else:
        migration.leave(entry, "no class behind a recipe section has this key")


def _move(migration: Migration, entry: Entry, dotted: str) -> None:
    """Move a key, with its value in the form that is read today."""
    value, key = entry.value, dotted.split(".", 1)[1]
    if dotted in migration.values:
        migration.leave(entry, f"{dotted} is set already, by another key of this file")
    elif value is None and not dotted.startswith("train."):
        migration.drop(entry, "it says nothing")
    elif key in STRATEGIES and value is False:
        migration.move(entry, dotted, "no", "an unquoted no is read as false")
    elif "dtype" in key and dtype_name(value) != value:
        migration.move(entry, dotted, dtype_name(value))
    elif dotted == "lora.target_modules" and target_modules(value) != value:
        migration.move(entry, dotted, target_modules(value))
    elif dotted.startswith("quantization.load_in") and not value:
        migration.drop(entry, "the quantization section is absent")
    elif dotted.startswith("quantization.bnb") and not migration.value("load_in_4bit"):
        migration.drop(entry, "the base is not loaded in 4 bits")
    else:
        trusting = dotted == "model.trust_remote_code" and value
        note = "also needs --trust-remote-code on the command line" if trusting else ""
        migration.move(entry, dotted, note=note)


def _complete(migration: Migration) -> None:
    """Add what TRL fills in by itself where the class behind a section fills in something else, and
    what it reads off the columns and the evaluation settings.
    """

    def fill(dotted: str, value: Any, why: str) -> None:
        if dotted not in migration.values:
            migration.add(dotted, value, why)

    values = migration.values
    for key, value in LORA_DEFAULTS.items() if migration.value("use_peft") else ():
        fill(f"lora.{key}", value, "TRL's default; PEFT's is another")
    if values.get("quantization.load_in_4bit"):
        fill("quantization.bnb_4bit_quant_type", "nf4", "TRL's default; bitsandbytes' is fp4")
        if (dtype := values.get("model.dtype")) not in (None, "auto"):
            why = "TRL computes in the model's dtype"
            fill("quantization.bnb_4bit_compute_dtype", dtype, why)
    if "dataset_text_field" in migration.entries:
        migration.add("data.prompt_format", "raw", "the text stands in one column")
    else:
        why = (
            "rows with messages; raw for prompt + completion or text, dolly or alpaca for"
            " instructions"
        )
        migration.add("data.prompt_format", "chat", why)
        if not (migration.value("completion_only_loss") or migration.value("assistant_only_loss")):
            why = "TRL learns whole conversations unless told otherwise; true learns answers only"
            fill("train.completion_only_loss", False, why)
    share = values.pop("validation", None)
    if values.get("train.eval_strategy", "no") in ("no", None) and share is None:
        why = "no evaluation was asked for, so no row is held out"
        migration.add("data.split", {"method": "none"}, why)
    else:
        held_out = {"method": "hash", "validation": share or 0.1}
        migration.add("data.split", held_out, "rows held out for evaluation")


def _mixture(migration: Migration, entry: Entry) -> None:
    """A mixture of data sets, in any of the three forms."""
    sources, lost = mixture_sources(entry.value)
    if not sources:
        raise RecipeError(f"'{entry.key}' names no data set", file=migration.file, line=entry.line)
    splits = migration.value("dataset_splits")
    named = any("source_split" in source for source in sources)
    if isinstance(splits, list) and splits and not named:
        split = next((name for name in splits if "train" in str(name)), splits[0])
        sources = [{**source, "source_split": split} for source in sources]
    text, note = "\n".join(entry.text), ""
    if re.search(r"^\s+-?\s*(columns|seed):", text, re.MULTILINE):
        note = "columns are found by name, and train.seed sets the order"
    if len(sources) == 1 and "weight" not in sources[0]:
        migration.move(entry, "data.source", sources[0]["source"], note)
        for key in ("subset", "source_split"):
            if key in sources[0]:
                migration.add(f"data.{key}", sources[0][key], f"from {entry.key}")
    else:
        migration.move(entry, "data.source", sources, note)
    size = entry.value.get("test_split_size") if isinstance(entry.value, dict) else None
    if isinstance(size, float) and 0 < size < 1:
        migration.values["validation"] = size
    elif size is not None:
        lost.append(f"test_split_size {size} rows; data.split.validation is a fraction")
    if lost:
        migration.leave(entry, "these parts have no place in data.source", *lost)


def _model_kwargs(migration: Migration, entry: Entry) -> None:
    """What has a key of its own in the model section moves there, unless the file says it elsewhere
    too.
    """
    kwargs = entry.value if isinstance(entry.value, dict) else {}
    moves = {**MOVES, "revision": "model.revision"}
    own = {key: moves[key] for key in kwargs if moves.get(key, "").startswith("model.")}
    said_elsewhere = {MOVES.get(key) for key in migration.entries}
    for key, dotted in own.items():
        if dotted not in said_elsewhere:
            value = dtype_name(kwargs[key]) if dotted == "model.dtype" else kwargs[key]
            migration.add(dotted, value, f"from {entry.key}.{key}")
    rest = {key: value for key, value in kwargs.items() if key not in own}
    if not own:
        migration.move(entry, "model.kwargs")
    elif rest:
        migration.move(entry, "model.kwargs", rest)
    else:
        migration.drop(entry, "its keys stand in the model section")


def _run_name(migration: Migration, entry: Entry) -> None:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(entry.value)).name).strip("-._")[:100]
    try:
        migration.move(entry, "run.name", check_run_name(name), "runs lie in runs/<run.name>")
    except RecipeError:
        migration.leave(entry, "runs lie in runs/<run.name>, and this is no name for a run")


def _accelerate_config(migration: Migration, entry: Entry) -> None:
    why = (
        "no accelerate config of that kind here; name a file in accelerate_configs/ as"
        " launch.accelerate"
    )
    name = ACCELERATE_NAMES.get(Path(str(entry.value)).stem)
    migration.move(entry, "launch.accelerate", name) if name else migration.leave(entry, why)


def _packing_strategy(migration: Migration, entry: Entry) -> None:
    renamed = {"ffd": "bfd", "bfd-requeue": "bfd_split"}.get(str(entry.value))
    today = (renamed, "the name today") if renamed else ()
    migration.move(entry, "train.packing_strategy", *today)


# Keys whose value decides what becomes of them; `m` is the migration, `e` the key's entry.
_SPECIAL: dict[str, Callable[[Migration, Entry], None]] = {
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "datasets"), _mixture),
    "model_init_kwargs": _model_kwargs,
    "accelerate_config": _accelerate_config,
    "packing_strategy": _packing_strategy,
    "run_name": _run_name,
    "output_dir": lambda m, e: (
        m.drop(e, "runs lie in runs/<run.name>") if m.value("run_name") else _run_name(m, e)
    ),
    "warmup_ratio": lambda m, e: (
        m.drop(e, "warmup_steps is set and wins")
        if m.value("warmup_steps")
        else m.move(e, "train.warmup_steps", note="a number below 1 is a fraction of all steps")
    ),
    "warmup_steps": lambda m, e: (
        m.move(e, "train.warmup_steps")
        if e.value or "warmup_ratio" not in m.entries
        else m.drop(e, "0, so warmup_ratio holds")
    ),
    "group_by_length": lambda m, e: (
        m.move(e, "train.train_sampling_strategy", "group_by_length")
        if e.value is True
        else m.drop(e, "random order is the default")
    ),
    "max_steps": lambda m, e: (
        m.drop(e, "num_train_epochs decides")
        if isinstance(e.value, int) and e.value <= 0
        else m.move(e, "train.max_steps")
    ),
    "assistant_only_loss": lambda m, e: (
        m.move(e, "data.chat_loss", "all", "loss on every assistant turn; any template will do")
        if e.value
        else m.drop(e, "train.completion_only_loss says it")
    ),
    "dataset_text_field": lambda m, e: m.move(e, "data.columns", {"text": e.value}),
    "use_flash_attention_2": lambda m, e: (
        m.move(e, "model.attn_implementation", "flash_attention_2")
        if e.value
        else m.drop(e, "the fastest kernel that is installed is taken")
    ),
    "tokenizer_name_or_path": lambda m, e: (
        m.drop(e, "the tokenizer is the model's")
        if e.value in (None, m.value("model_name_or_path"))
        else m.leave(e, NOT_CARRIED["tokenizer_name_or_path"])
    ),
}


def dtype_name(value: Any) -> Any:
    """Return the full name of a dtype: bf16 -> bfloat16, torch.float16 -> float16."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return SHORT_DTYPES.get(name, name) if isinstance(name, str) else name


def target_modules(value: Any) -> Any:
    """Return LoRA's target modules as PEFT takes them: a list of names, or the word all-linear.

    Example:
        >>> target_modules("q_proj, v_proj"), target_modules(["all-linear"])
        (['q_proj', 'v_proj'], 'all-linear')
    """
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return "all-linear" if names == ["all-linear"] else names


def mixture_sources(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Turn a mixture (`dataset_mixer`, `dataset_mixture` or TRL's `datasets`) into entries of
    `data.source`.

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
        entry = {
            "source": name,
            "subset": item.get("config", item.get("name")),
            "source_split": item.get("split"),
            "weight": item.get("weight") if item.get("weight") != 1 else None,
        }
        sources.append({key: text for key, text in entry.items() if text is not None})
        if (share := item.get("fraction")) is not None:
            # the parts of one data set differ by their split
            part = f"{name} ({item['split']})" if item.get("split") else name
            what = f"{part}: {share} of the mixture; say how much of its own rows (weight)"
            lost.append(what)
        if files is not None:
            kept = [key for key in ("data_dir", "data_files") if item.get(key) is not None]
            lost += [f"{name}: {key} {item[key]!r}" for key in kept]
    return sources, lost


def _mixture_items(value: Any) -> list[dict[str, Any]]:
    """Return the sources of a mixture, whichever of the three forms it has."""
    if isinstance(value, dict) and isinstance(value.get("datasets"), list):
        value = value["datasets"]
    elif isinstance(value, dict):
        value = [{"id": name, "weight": share} for name, share in value.items()]
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, dict) else {"id": item} for item in items]


_AS_WRITTEN = object()


@dataclass
class Entry:
    """One top-level key of the flat file: its value and the text it was written with."""

    key: str
    value: Any
    line: int
    text: list[str]
    comments_above: list[str] = field(default_factory=list)
    comment_beside: str = ""


@dataclass
class Migration:
    """A migration in progress, then its result: `text()` of the recipe and the `changes` to list.

    By dotted key, `values` holds what the recipe says and `origins` the flat key it came from;
    `left` are the lines of what stays behind.
    """

    file: str
    entries: dict[str, Entry]
    changes: list[str] = field(default_factory=list)
    placed: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    waiting_comments: list[str] = field(default_factory=list)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the flat file's value of `key`."""
        return self.entries[key].value if key in self.entries else default

    def move(self, entry: Entry, dotted: str, value: Any = _AS_WRITTEN, note: str = "") -> None:
        """Place an entry under its new name; a `value` replaces the one that was written."""
        key = dotted.split(".", 1)[1]
        lines = [line for line in (*self.waiting_comments, *entry.comments_above) if line.strip()]
        self.waiting_comments, entry.comments_above = [], []
        if value is _AS_WRITTEN:
            written = r"^(['\"]?)" + re.escape(entry.key) + r"\1(?=\s*:)"
            lines += [re.sub(written, key, entry.text[0]), *entry.text[1:]]
        else:
            lines += _dump(key, value, entry.comment_beside)
        self._place(dotted, lines, entry.value if value is _AS_WRITTEN else value)
        self.origins[dotted] = entry.key
        renamed = "" if key == entry.key else " (renamed)"
        changed = "" if value is _AS_WRITTEN else f": {_short(entry.value)} -> {_short(value)}"
        note = f"; {note}" if note else ""
        new = f"{dotted}{renamed}{changed}{note}"
        self.changes.append(f"{self.file}:{entry.line}: {entry.key} -> {new}")

    def add(self, dotted: str, value: Any, why: str) -> None:
        """Add a key that the flat file did not have."""
        self._place(dotted, _dump(dotted.split(".", 1)[1], value, f"# {why}"), value)
        self.changes.append(f"added {dotted}: {_short(value)}; {why}")

    def drop(self, entry: Entry, why: str) -> None:
        """Leave out an entry that has no effect here."""
        self._keep_comments(entry)
        self.changes.append(f"{self.file}:{entry.line}: {entry.key} left out; {why}")

    def leave(self, entry: Entry, why: str, *details: str) -> None:
        """Keep an entry as a comment at the end of the recipe."""
        self._keep_comments(entry)
        text = [f"{entry.key}: (not copied)"] if is_secret_name(entry.key) else entry.text
        self.left += [
            f"# {entry.key}: {why}",
            *(f"#   {detail}" for detail in details),
            *(f"#     {line}".rstrip() for line in text),
        ]
        for what in [f" ({detail})" for detail in details] or [""]:
            line = f"{self.file}:{entry.line}: {entry.key} NOT CARRIED OVER{what}; {why}"
            self.changes.append(line)

    def text(self) -> str:
        """Return the recipe as YAML text."""
        lines = [*self.header]
        for section in SECTIONS:
            if section in self.placed:
                lines += ["", f"{section}:", *self.placed[section]]
            elif section == "lora":
                lines += ["", "lora: null"]
        if self.left:
            lines += [
                "",
                "# Not carried over by `recipes migrate`, with the lines as they were:",
                *self.left,
            ]
        if any(self.waiting_comments):
            lines += ["", *(line for line in self.waiting_comments if line.strip())]
        return "\n".join(lines).rstrip() + "\n"

    def _place(self, dotted: str, lines: list[str], value: Any) -> None:
        self.placed.setdefault(dotted.split(".", 1)[0], []).extend(
            f"  {line}" if line.strip() else "" for line in lines
        )
        self.values[dotted] = value

    def _keep_comments(self, entry: Entry) -> None:
        """Hand the comments above an entry that goes to the next one that stays: they are headings
        more often than remarks.
        """
        self.waiting_comments += entry.comments_above


def cut_into_entries(text: str, values: dict[str, Any]) -> tuple[dict[str, Entry], list[str]]:
    """Cut the file into its top-level keys, each with the comment lines above it.

    Returns:
        The entries, and the comment lines at the end of the file.
    """
    lines = text.split("\n")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "anything else was refused before"
    pairs = root.value
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    entries: dict[str, Entry] = {}
    # no line of its own, or text that would lose its anchor: write the values anew
    if root.flow_style or any(isinstance(event, yaml.AliasEvent) for event in events):
        for key_node, _ in pairs:
            key = key_node.value
            line = key_node.start_mark.line + 1
            entries[key] = Entry(key, values[key], line, _dump(key, values[key]))
        return entries, [line for line in lines if line.startswith("#")]
    starts = [key_node.start_mark.line for key_node, _ in pairs] + [len(lines)]
    above = [line for line in lines[: starts[0]] if not line.startswith(("---", "%"))]
    for index, (key_node, value_node) in enumerate(pairs):
        block = lines[starts[index] : starts[index + 1]]
        size = len(block)
        while size > 1 and (not block[size - 1].strip() or block[size - 1].startswith("#")):
            size -= 1
        beside = ""
        if value_node.end_mark.line == key_node.start_mark.line:
            rest = block[0][value_node.end_mark.column :].strip()
            beside = rest if rest.startswith("#") else ""
        entries[key_node.value] = Entry(
            key_node.value, values[key_node.value], starts[index] + 1, block[:size], above, beside
        )
        above = block[size:]
    return entries, above


def _dump(key: str, value: Any, comment: str = "") -> list[str]:
    """Return `key: value` as YAML lines; mappings of scalars in one line."""
    nested = (dict, list)
    if isinstance(value, dict) and not any(isinstance(one, nested) for one in value.values()):
        lines = [f"{key}: {_flow(value)}"]
    else:
        text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000)
        lines = text.rstrip("\n").split("\n")
    return [f"{lines[0]}  {comment}", *lines[1:]] if comment and len(lines) == 1 else lines


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _short(value: Any) -> str:
    text = _flow(value).replace("\n...", "")
    return text if len(text) <= 60 else f"{text[:57]}..."
