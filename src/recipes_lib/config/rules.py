"""What must hold between the keys of a recipe, where upstream would be silently wrong or would say
so only after a model was loaded. Needs no torch.

Each rule yields the key to blame, what is wrong, and hints. Values of a wrong type were left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.batch import WITHOUT_WARMUP, solve_batch, warmup_steps
from recipes_lib.config.documents import Document, Section
from recipes_lib.config.launch import load_accelerate_config, plan_launch, precision_conflict
from recipes_lib.config.sections import HUB_ID, TRL, VARLEN, trl_templates
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.upstream import upstream_default
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import check_run_name
from recipes_lib.models.packaged import is_packaged

if TYPE_CHECKING:
    from recipes_lib.config.recipe import RecipeFile

_Finding = tuple[str, ...]
NOT_IN_MODEL_KWARGS = {
    **{
        key: f"write model.{key}"
        for key in ("dtype", "attn_implementation", "trust_remote_code", "revision")
    },
    "torch_dtype": "write model.dtype",
    "quantization_config": "write a quantization section",
    "device_map": "the launcher decides where the model lies",
    "use_safetensors": "safetensors are always read",
    "token": "a secret never belongs in a file; log in with 'hf auth login'",
}
# What accelerate would do to the rows of a step depends on the number of processes.
_CHANGES_ROWS = {"split_batches": True, "dispatch_batches": True, "use_seedable_sampler": False}


def written(section: Section | None) -> dict[str, Any]:
    """Return what somebody wrote into a section."""
    return {} if section is None else section.model_dump(exclude_unset=True)


def base_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what cannot be, in a recipe and in what it extends."""
    train, lora, quantization = map(written, (recipe.train, recipe.lora, recipe.quantization))
    for rule in (
        _precision(recipe, train, quantization),
        _targets(lora),
        _model_and_data(recipe),
        _accelerator(train.get("accelerator_config") or {}),
    ):
        for key, what, *hints in rule:
            yield document.error(key, what, *hints)
    _warn(recipe, document, train)


def recipe_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what a whole recipe cannot mean."""
    train, lora, quantization = map(written, (recipe.train, recipe.lora, recipe.quantization))
    for rule in (
        _quantized(recipe, train, lora, quantization),
        _attention(recipe, train),
        _validation(recipe, train),
        _launch(recipe, train),
    ):
        for key, what, *hints in rule:
            yield document.error(key, what, *hints)
    if recipe.run.name is not None:
        try:
            check_run_name(recipe.run.name)
        except RecipeError as error:
            yield document.error("run.name", error.what, *error.hints)


def machine_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong on this machine with the recipe's own launch: only `recipes check` asks,
    as a launch from the command line may have other processes.
    """
    if wrong := no_model_at(recipe.model.name_or_path):
        yield document.error("model.name_or_path", *wrong)
    if recipe.run.global_batch_size is None:
        return
    try:
        world_size = plan_launch(recipe.launch).world_size
    except RecipeError:
        return  # a rule of its own
    per_device = written(recipe.train).get(
        "per_device_train_batch_size", upstream_default("train", "per_device_train_batch_size")
    )
    try:
        solve_batch(recipe.run.global_batch_size, per_device, world_size)
    except RecipeError as error:
        yield document.error("run.global_batch_size", error.what, *error.hints)


def _precision(
    recipe: RecipeFile, train: dict[str, Any], quantization: dict[str, Any]
) -> Iterator[_Finding]:
    if train.get("bf16") and train.get("fp16"):
        what = "train.bf16 and train.fp16 are both true; a run has one precision"
        yield "train.fp16", what, "remove one of them (bf16 needs no loss scaling)"
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        what = "quantization.load_in_4bit and load_in_8bit are both true"
        yield "quantization.load_in_8bit", what, "remove one of them"
    kernel = recipe.model.attn_implementation or ""
    if "flash" in kernel and recipe.model.dtype == "float32":
        what = f"model.attn_implementation {kernel} cannot compute in float32"
        hint = "set model.dtype: bfloat16, or attn_implementation: sdpa"
        yield "model.attn_implementation", what, hint


def _targets(lora: dict[str, Any]) -> Iterator[_Finding]:
    key, targets = "lora.target_modules", lora.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and targets.isidentifier():
        # PEFT takes a text for a regular expression of the whole name, and this matches nothing
        yield key, f"{key} must be a list of names, got {targets!r}", f"write [{targets}]"
    if targets == "" or (targets == [] and not lora.get("target_parameters")):
        hint = "write all-linear or a list such as [q_proj, v_proj]"
        yield key, f"{key} is empty: no layer would be trained", hint
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        what = "holds lm_head: the loss cannot run through an adapter on the output layer"
        yield key, f"{key} {what}", "remove lm_head"


def _model_and_data(recipe: RecipeFile) -> Iterator[_Finding]:
    for key in recipe.model.kwargs.keys() & NOT_IN_MODEL_KWARGS.keys():
        what = f"model.kwargs.{key} cannot be set there"
        yield f"model.kwargs.{key}", what, NOT_IN_MODEL_KWARGS[key]
    template = recipe.data.chat_template or ""
    if template.startswith(TRL) and template not in (shipped := trl_templates()):
        what = f"data.chat_template: TRL ships no template {template!r}"
        hints = did_you_mean(template, shipped) or [f"there are {', '.join(shipped)}"]
        yield "data.chat_template", what, *hints
    split = recipe.data.split
    if split.validation + split.test >= 1:
        total = f"validation + test = {split.validation + split.test:g}"
        what = f"data.split leaves no training rows: {total}"
        yield "data.split", what, "make the sum smaller than 1"


def _accelerator(config: dict[str, Any]) -> Iterator[_Finding]:
    for key, wrong in _CHANGES_ROWS.items():
        if config.get(key) is wrong:
            name = f"train.accelerator_config.{key}"
            what = f"{name}: {str(wrong).lower()} gives the steps other examples on another number"
            yield name, f"{what} of processes", "remove it"
    if "num_steps" in (config.get("gradient_accumulation_kwargs") or {}):
        name = "train.accelerator_config.gradient_accumulation_kwargs"
        what = f"{name}.num_steps would replace train.gradient_accumulation_steps"
        yield name, what, "set train.gradient_accumulation_steps or run.global_batch_size"


def _quantized(
    recipe: RecipeFile, train: dict[str, Any], lora: dict[str, Any], quantization: dict[str, Any]
) -> Iterator[_Finding]:
    dtype, fp16 = recipe.model.dtype, train.get("fp16") is True
    is_half = dtype in ("float16", "bfloat16")
    if fp16 and recipe.lora is None and is_half:
        what = f"train.fp16 cannot train weights that are {dtype}: loss scaling needs float32 ones"
        yield "train.fp16", what, "set model.dtype: float32, or train.bf16: true in place of fp16"
    if recipe.quantization is None:
        return
    four, eight = (quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if not four and not eight:
        hint = "set load_in_4bit: true or load_in_8bit: true, or remove the section"
        yield "quantization", "quantization switches nothing on", hint
    if (four or eight) and recipe.lora is None:
        what = "quantized weights cannot be trained without an adapter"
        yield "quantization", what, "add a lora section, or remove quantization"
    # A 4-bit layer answers in the base's precision; where autocast's is the other half, the next
    # concatenation ends the run.
    bf16 = train.get("bf16", True) is True
    half = "float16" if fp16 else "bfloat16" if bf16 else dtype
    if four and is_half and dtype != half:
        under = "train.fp16" if fp16 else "train.bf16"
        what = f"model.dtype {dtype} under {under}: 4-bit layers would mix the two"
        yield "model.dtype", f"{what}, which torch refuses", f"set model.dtype: {half}"


def _attention(recipe: RecipeFile, train: dict[str, Any]) -> Iterator[_Finding]:
    if train.get("train_sampling_strategy") == "batch_rebalance":
        key = "train.train_sampling_strategy"
        what = f"{key} batch_rebalance deals out the rows of a step by the number of processes"
        yield key, what, "set group_by_length, which puts rows of like length into one step"
    key = "model.attn_implementation"
    if recipe.model.attn_implementation == VARLEN:
        if train.get("packing") and train.get("packing_strategy") == "wrapped":
            what = f"{key} {VARLEN}: wrapped rows do not say where an example ends"
            yield key, what, "set attn_implementation: sdpa, or train.packing_strategy: bfd"
        elif train.get("padding_free") is False:
            what = f"{key} {VARLEN} is for rows without padding, and train.padding_free is false"
            yield key, what, "remove train.padding_free, or set attn_implementation: sdpa"
    how, key = train.get("activation_checkpointing_kwargs"), "train.activation_checkpointing_kwargs"
    if not how or not how.get("selective"):
        return
    if train.get("activation_checkpointing") is not True:
        what = f"{key}.selective: train.activation_checkpointing is off"
        yield key, what, "set train.activation_checkpointing: true, or remove selective"
    elif how.get("use_reentrant") or recipe.model.attn_implementation == "eager":
        what = f"{key}.selective cannot work with use_reentrant: true, nor with eager attention"
        yield key, what, "remove selective"


def _validation(recipe: RecipeFile, train: dict[str, Any]) -> Iterator[_Finding]:
    strategy, saved = train.get("eval_strategy", "no"), train.get("save_strategy", "steps")
    split = recipe.data.split
    if strategy != "no" and (split.method == "none" or split.validation == 0):
        what = f"train.eval_strategy is {strategy}, but data.split holds no validation rows out"
        hint = "set data.split.validation, or train.eval_strategy: no"
        yield "train.eval_strategy", what, hint
    key = "train.load_best_model_at_end"
    if not train.get("load_best_model_at_end") or saved == "best":
        return
    if strategy != saved:
        what = f"{key} needs a checkpoint at every validation: eval_strategy is {strategy},"
        hint = "set both to steps or both to epoch, or save_strategy: best"
        yield key, f"{what} save_strategy {saved}", hint
    every = train.get("eval_steps") or train.get("logging_steps", 500)
    between = train.get("save_steps", 500)
    if strategy == saved == "steps" and every >= 1 and between % every:
        what = f"{key}: train.save_steps {between:g} is not a multiple of train.eval_steps"
        below = between // every * every
        near = " or ".join(f"{steps:g}" for steps in (below, below + every) if steps)
        yield key, f"{what} {every:g}", f"set train.save_steps to {near}"


def _launch(recipe: RecipeFile, train: dict[str, Any]) -> Iterator[_Finding]:
    name = recipe.launch.accelerate
    try:
        config = load_accelerate_config(name)
    except RecipeError as error:
        for inner in error.errors:
            yield "launch.accelerate", inner.what, *inner.hints
        return
    if conflict := precision_conflict(train, config.mixed_precision, f"launch.accelerate {name}"):
        yield "launch.accelerate", *conflict
    for key, number in (("gpus", recipe.launch.gpus or 1), ("nodes", recipe.launch.nodes)):
        if config.distributed_type == "NO" and number > 1:
            what = f"launch.accelerate {name} starts one process, but launch.{key} is {number}"
            hint = "set launch.accelerate to ddp or fsdp (ddp_cpu or fsdp_cpu without GPUs)"
            yield f"launch.{key}", what, hint


def _warn(recipe: RecipeFile, document: Document, train: dict[str, Any]) -> None:
    """Add combinations that are legal but rarely meant."""
    steps, warmup = train.get("max_steps", -1), train.get("warmup_steps", 0)
    if "num_train_epochs" in train and steps > 0:
        what = "train.max_steps wins over train.num_train_epochs"
        document.warn("train.max_steps", what, "remove one of them")
    if recipe.run.global_batch_size and "gradient_accumulation_steps" in train:
        key = "train.gradient_accumulation_steps"
        what = f"{key} is ignored: it is derived from run.global_batch_size"
        document.warn(key, what, "remove one of them")
    warms_up = train.get("lr_scheduler_type") not in WITHOUT_WARMUP
    if steps > 0 and warms_up and warmup_steps(warmup, steps) >= steps:
        what = f"train.warmup_steps {warmup:g} takes all of train.max_steps {steps}"
        hint = "the first step of a warm-up trains nothing; set train.warmup_steps: 0"
        document.warn("train.warmup_steps", f"{what}: train.learning_rate is never reached", hint)
    if recipe.data.prompt_format == "raw" and train.get("completion_only_loss") is False:
        key = "train.completion_only_loss"
        document.warn(key, f"{key} false: the loss is on prompts too", "TRL's default: remove it")
    lora = written(recipe.lora)
    before, rank, alpha = (
        document.replaced.get(("lora", "r")),
        lora.get("r"),
        lora.get("lora_alpha"),
    )
    same_file = document.origin("lora.r").file == document.origin("lora.lora_alpha").file
    if isinstance(before, int) and before > 0 and rank and alpha and not same_file:
        root = 0.5 if lora.get("use_rslora") else 1
        was, now = alpha / before**root, alpha / rank**root
        what = f"lora.r {before} -> {rank} with lora.lora_alpha still {alpha} scales the adapter by"
        hint = f"to change the rank alone: lora.lora_alpha={was * rank**root:g}"
        document.warn("lora.r", f"{what} {now:g} instead of {was:g}", hint)


def no_model_at(name: str) -> _Finding | None:
    """Return what is wrong with the name of a model that can only be a path, and a hint; None for a
    folder and for a Hub id.
    """
    path = Path(name)
    if is_packaged(name) or path.is_dir():
        return None
    if name.endswith(".gguf"):
        what = f"'{name}' is a GGUF file; quantized weights cannot be trained further"
        return what, "give the original model's folder or Hub id"
    if path.is_file():
        return f"'{name}' is a file", "a model is a folder with config.json, safetensors, tokenizer"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return f"no such folder: {name}", "a relative folder is meant from the working directory"
    odd = "--" in name or ".." in name or name.endswith((".git", ".", "-")) or not name.isascii()
    if odd or not HUB_ID.fullmatch(name) or max(map(len, name.split("/"))) > 96:
        what = f"{name!r} is not a folder here, and cannot be a name on the Hub"
        return what, "the Hub's names are like meta-llama/Llama-3.1-8B"
    return None
