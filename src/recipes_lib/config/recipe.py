"""A recipe: sections as values, each with the place it was written, and what must hold between
them.

`load_recipe` is the only way in. A resolved recipe is a recipe: `resolved.yaml` has every value,
absolute paths and no `extends`, and is what jobs, resumed runs and evaluations read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

from recipes_lib.config.batch import solve_batch
from recipes_lib.config.documents import Document, Origin, dotted, read
from recipes_lib.config.launch import plan_launch, precision_conflict
from recipes_lib.config.parsing import Section, judge, parse
from recipes_lib.config.sections import (
    HUB_ID,
    VARLEN,
    DataSection,
    LaunchSection,
    ModelSection,
    RunSection,
    SplitSection,
)
from recipes_lib.config.upstream import (
    TRAIN_DEFAULTS,
    LoraSection,
    QuantizationSection,
    TrainSection,
    upstream_default,
)
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name
from recipes_lib.models.packaged import is_packaged

RECIPE_FILE = "resolved.yaml"
PROJECT_DEFAULT = Origin("project default")
UPSTREAM_DEFAULT = Origin("default")


class RecipeFile(Section):
    """A fine-tuning recipe."""

    kind: ClassVar = "recipe"

    model: ModelSection
    quantization: QuantizationSection | None = None
    """`transformers.BitsAndBytesConfig`, key by key. Absent or null: nothing is quantized."""
    lora: LoraSection | None = None
    """`peft.LoraConfig`, key by key. Absent or null: full fine-tuning."""
    data: DataSection
    train: TrainSection = TrainSection()
    """`trl.SFTConfig`, key by key."""
    run: RunSection = RunSection()
    launch: LaunchSection = LaunchSection()


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    `train` holds what goes to `SFTConfig`: the recipe's keys and the project's defaults. `name` is
    the run's name, `document` knows where each value was written. Paths are absolute.
    """

    document: Document
    name: str
    model: ModelSection
    data: DataSection
    run: RunSection
    launch: LaunchSection
    train: dict[str, Any]
    lora: dict[str, Any] | None
    quantization: dict[str, Any] | None

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return self.document.path

    @property
    def base_format(self) -> str | None:
        """What the base is quantized to: 4-bit or 8-bit; None where it is in `model.dtype`."""
        if self.quantization is None:
            return None
        return "8-bit" if self.quantization.get("load_in_8bit") else "4-bit"

    def to_dict(self) -> dict[str, Any]:
        """Return all resolved sections as plain nested values."""
        return {
            "model": self.model.model_dump(),
            "quantization": self.quantization,
            "lora": self.lora,
            "data": self.data.model_dump(warnings=False),
            "train": dict(self.train),
            "run": {**self.run.model_dump(), "name": self.name},
            "launch": self.launch.model_dump(),
        }

    def write(self, path: Path) -> None:
        """Write the resolved recipe: one that is the same anywhere."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def reading(self, file: str) -> Recipe:
        """Return the recipe that reads all rows of a file in the format of its own, and holds none
        of them out.
        """
        values = {"source": file, "split": SplitSection(method="none"), "max_examples": None}
        # no split is wanted of the file, so no validation may be asked for
        train = self.train | {"eval_strategy": "no", "load_best_model_at_end": False}
        return replace(self, data=self.data.model_copy(update=values), train=train)

    def origin_of(self, key: str) -> Origin:
        """Return where the value of a dotted key was written; a key nobody wrote has a default's
        origin.
        """
        section, _, name = key.partition(".")
        ours = section == "train" and name in TRAIN_DEFAULTS
        default = PROJECT_DEFAULT if ours else UPSTREAM_DEFAULT
        places = {dotted(path): place for path, place in self.document.origins.items()}
        return places.get(key, default)

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written; for a default, where its section or else
        the recipe is.
        """
        return self.document.error(key, what, *hints)

    def fault(self, key: str, what: str, *hints: str) -> EnvironmentFault:
        """Return an error of the machine, placed where `key` asks for what it has not."""
        origin = self.document.origin(key)
        return EnvironmentFault(what, *hints, file=origin.file, line=origin.line)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe, without torch.

    Args:
        path: a file, or the short name of a shipped recipe.
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    document = read(path, overrides)
    return recipe_of(parse(RecipeFile, document, recipe_rules), document)


def check_recipe(document: Document) -> tuple[RecipeFile | None, list[RecipeError]]:
    """Return what `recipes check` says of a recipe or a base; what must hold between keys is asked
    of whole recipes.
    """
    if document.path.name.startswith("_"):
        return judge(RecipeFile, document, partial=True)
    return judge(RecipeFile, document, recipe_rules, machine_rules)


def recipe_of(file: RecipeFile, document: Document) -> Recipe:
    """Return the recipe of a document that was parsed.

    Raises:
        RecipeError: the run's name cannot be a folder's.
    """
    values, origin = document.values, document.origin("run.name")
    train = values.get("train")
    name = file.run.name or f"{document.path.resolve().parent.name}--{document.path.stem}"
    return Recipe(
        document=document,
        name=check_run_name(name, origin.file, origin.line),
        model=file.model,
        data=file.data,
        run=file.run,
        launch=file.launch,
        train=TRAIN_DEFAULTS | (train if isinstance(train, dict) else {}),  # check asks of bad ones
        lora=values.get("lora"),
        quantization=values.get("quantization"),
    )


@lru_cache(maxsize=1)
def recipe_keys() -> dict[str, dict[str, Any]]:
    """Return dotted key -> JSON Schema, with text and default, of every section and key."""
    root = RecipeFile.model_json_schema()
    keys: dict[str, dict[str, Any]] = {}

    def visit(schema: dict[str, Any], prefix: str) -> None:
        for key, part in schema.get("properties", {}).items():
            names = [kind["$ref"] for kind in (part, *part.get("anyOf", [])) if "$ref" in kind]
            inner = root["$defs"][names[0].rpartition("/")[2]] if len(names) == 1 else {}
            keys[f"{prefix}{key}"] = {**inner, **part}
            visit(inner, f"{prefix}{key}.")

    visit(root, "")
    return keys


# What must hold between keys, where upstream would be silently wrong, or would say so only after a
# model was loaded. Each rule yields the key to blame, what is wrong, and hints.

_Finding = tuple[str, ...]
_IN_MODEL = ("dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "revision")
_NOT_IN_MODEL_KWARGS = {
    **{key: f"write model.{key.removeprefix('torch_')}" for key in _IN_MODEL},
    "quantization_config": "write a quantization section",
    "device_map": "the launcher decides on which device the model is",
    "use_safetensors": "safetensors are always read",
    "token": "a secret never belongs in a file; log in with 'hf auth login'",
}


def recipe_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what a recipe cannot mean; values of a wrong type were left out."""
    train = _written(recipe.train)
    for rule in (_model(recipe, train), _adapter(recipe, train), _validation(recipe, train)):
        for key, what, *hints in rule:
            yield document.error(key, what, *hints)
    yield from _launch(recipe, train, document)
    if recipe.run.name is not None:
        try:
            check_run_name(recipe.run.name)
        except RecipeError as error:
            yield document.error("run.name", error.what, *error.hints)
    _warn(recipe, document, train)


def machine_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong on this machine with the recipe's own launch: only `recipes check` asks,
    as a launch from the command line may have other processes.
    """
    if wrong := no_model_at(recipe.model.name_or_path):
        yield document.error("model.name_or_path", *wrong)
    key = "per_device_train_batch_size"
    per_device = _written(recipe.train).get(key, upstream_default("train", key))
    try:
        if recipe.run.global_batch_size is not None:
            world_size = plan_launch(recipe.launch).world_size
            solve_batch(recipe.run.global_batch_size, per_device, world_size)
    except RecipeError as error:
        yield document.error("run.global_batch_size", error.what, *error.hints)


def _written(section: Section | None) -> dict[str, Any]:
    return {} if section is None else section.model_dump(exclude_unset=True)


def _model(recipe: RecipeFile, train: dict[str, Any]) -> Iterator[_Finding]:
    wrapped = train.get("packing") and train.get("packing_strategy") == "wrapped"
    padded = train.get("padding_free") is False
    if recipe.model.attn_implementation == VARLEN and (wrapped or padded):
        key, why = "model.attn_implementation", "wrapped rows" if wrapped else "padding_free: false"
        yield key, f"{key}: {VARLEN} under {why} would silently be sdpa", "remove one of them"
    how = train.get("activation_checkpointing_kwargs") or {}
    checkpoints = train.get("activation_checkpointing") and not how.get("use_reentrant")
    if how.get("selective") and not checkpoints:  # TRL would say so, but it is not given the key
        key = "train.activation_checkpointing_kwargs"
        what = f"{key}: selective needs train.activation_checkpointing: true, not reentrant"
        yield key, what, "set it, or remove selective"
    for key in recipe.model.kwargs.keys() & _NOT_IN_MODEL_KWARGS.keys():
        what = f"model.kwargs.{key} cannot be set there"
        yield f"model.kwargs.{key}", what, _NOT_IN_MODEL_KWARGS[key]


def _adapter(recipe: RecipeFile, train: dict[str, Any]) -> Iterator[_Finding]:
    key, targets = "lora.target_modules", _written(recipe.lora).get("target_modules")
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        what = f"{key} holds lm_head: the loss cannot run through an adapter on the output layer"
        yield key, what, "remove lm_head"
    quantization = _written(recipe.quantization)
    four, eight = (quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if recipe.quantization is not None and not four and not eight:
        hint = "set load_in_4bit: true or load_in_8bit: true, or remove the section"
        yield "quantization", "the quantization section turns nothing on", hint
    elif recipe.quantization is not None and recipe.lora is None:
        what = "quantized weights cannot be trained without an adapter"
        yield "quantization", what, "add a lora section, or remove quantization"
    # A 4-bit layer answers in the base's precision; where autocast's is the other half, the next
    # concatenation ends the run.
    dtype, under = recipe.model.dtype, "train.fp16" if train.get("fp16") else "train.bf16"
    half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else dtype
    if four and dtype in ("float16", "bfloat16") and dtype != half:
        what = f"model.dtype {dtype} under {under}: 4-bit layers would mix the two"
        yield "model.dtype", f"{what}, which torch refuses", f"set model.dtype: {half}"


def _validation(recipe: RecipeFile, train: dict[str, Any]) -> Iterator[_Finding]:
    strategy, split = train.get("eval_strategy", "no"), recipe.data.split
    if strategy != "no" and (split.method == "none" or split.validation == 0):
        what = f"train.eval_strategy is {strategy}, but data.split holds no validation rows out"
        hint = "set data.split.validation, or train.eval_strategy: no"
        yield "train.eval_strategy", what, hint


def _launch(recipe: RecipeFile, train: dict[str, Any], document: Document) -> Iterator[RecipeError]:
    key, name = "launch.accelerate", recipe.launch.accelerate
    try:
        asked = plan_launch(recipe.launch).config.mixed_precision
        if conflict := precision_conflict(train, asked, f"{key} {name}"):
            yield document.error(key, *conflict)
    except RecipeError as error:
        for wrong in error.errors:
            yield document.error(key, wrong.what, *wrong.hints)


def _warn(recipe: RecipeFile, document: Document, train: dict[str, Any]) -> None:
    """Add combinations that are legal but rarely meant."""
    if recipe.run.global_batch_size and "gradient_accumulation_steps" in train:
        key = "train.gradient_accumulation_steps"
        what = f"{key} is ignored: it is derived from run.global_batch_size"
        document.warn(key, what, "remove one of them")
    if recipe.data.prompt_format == "raw" and train.get("completion_only_loss") is False:
        key = "train.completion_only_loss"
        document.warn(key, f"{key} false: the loss is on prompts too", "TRL's default: remove it")
    lora, before = _written(recipe.lora), document.replaced.get(("lora", "r"))
    rank, alpha = lora.get("r"), lora.get("lora_alpha")
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
    if path.is_file() or name.endswith(".gguf"):
        what = f"'{name}' is a {'GGUF ' * name.endswith('.gguf')}file"
        return what, "a model is a folder with config.json, safetensors and a tokenizer"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return f"no such folder: {name}", "a relative path starts at the working directory"
    if not HUB_ID.fullmatch(name):
        what = f"{name!r} is not a folder here, and cannot be a name on the Hub"
        return what, "a Hub name looks like meta-llama/Llama-3.1-8B"
    return None
