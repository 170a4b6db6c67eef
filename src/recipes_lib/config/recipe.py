"""A recipe: sections as values, each with the place it was written, and what must hold between
them. `load_recipe` is the only way in.

A resolved recipe is a recipe: `resolved.yaml` has every value, absolute paths and no `extends`, and
is what jobs, resumed runs and evaluations read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import yaml

from recipes_lib.config.documents import Document, Origin, Values, dotted, read
from recipes_lib.config.launch import plan_launch, precision_conflict, solve_batch
from recipes_lib.config.parsing import Schema, Section, judge, parse
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
A_MODEL = "a model is a folder with config.json, safetensors and a tokenizer"


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
    """A resolved recipe: paths are absolute, `train` has the project's defaults too."""

    document: Document
    name: str  # of the run
    model: ModelSection
    data: DataSection
    run: RunSection
    launch: LaunchSection
    train: Values
    lora: Values | None
    quantization: Values | None

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

    def to_dict(self) -> Values:
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
        """Return the recipe with all rows of another file, of which none is held out."""
        values = {"source": file, "split": SplitSection(method="none"), "max_examples": None}
        # no split is wanted of the file, so no validation may be asked for
        train = self.train | {"eval_strategy": "no", "load_best_model_at_end": False}
        return replace(self, data=self.data.model_copy(update=values), train=train)

    def origin_of(self, key: str) -> Origin:
        """Return where the value of a dotted key was written, or that it is a default."""
        places = {dotted(path): place for path, place in self.document.origins.items()}
        ours = key.removeprefix("train.") in TRAIN_DEFAULTS
        return places.get(key, PROJECT_DEFAULT if ours else UPSTREAM_DEFAULT)

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` or else its section was written."""
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
    """
    document = read(path, overrides)
    return recipe_of(parse(RecipeFile, document, recipe_rules), document)


def check_recipe(document: Document) -> tuple[RecipeFile | None, list[RecipeError]]:
    """Return what `recipes check` says; of a base, only what its own keys are."""
    if document.path.name.startswith("_"):
        return judge(RecipeFile, document, partial=True)
    return judge(RecipeFile, document, recipe_rules, machine_rules)


def recipe_of(file: RecipeFile, document: Document) -> Recipe:
    """Return the recipe of a document that was parsed."""
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
def recipe_keys() -> dict[str, Schema]:
    """Return dotted key -> JSON Schema, with text and default, of every section and key."""
    root = RecipeFile.model_json_schema()
    keys: dict[str, Schema] = {}

    def visit(schema: Schema, prefix: str) -> None:
        for key, part in schema.get("properties", {}).items():
            names = [kind["$ref"] for kind in (part, *part.get("anyOf", [])) if "$ref" in kind]
            inner = root["$defs"][names[0].rpartition("/")[2]] if len(names) == 1 else {}
            keys[f"{prefix}{key}"] = {**inner, **part}
            visit(inner, f"{prefix}{key}.")

    visit(root, "")
    return keys


# What must hold between keys, where upstream would be silently wrong, or would say so only after a
# model was loaded: the key to blame, what is wrong, and hints.

_NOT_IN_MODEL_KWARGS = {
    *("dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "revision", "token"),
    *("quantization_config", "device_map"),
}


def recipe_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what a recipe cannot mean; values of a wrong type were left out."""
    train, name = _written(recipe.train), recipe.run.name
    for key, what, *hints in _findings(recipe, train):
        yield document.error(key, what, *hints)
    for key, check in {
        "launch.accelerate": lambda: plan_launch(recipe.launch),
        "run.name": lambda: check_run_name("unnamed" if name is None else name),
    }.items():
        try:
            check()
        except RecipeError as error:
            for wrong in error.errors:
                yield document.error(key, wrong.what, *wrong.hints)
    if recipe.run.global_batch_size and "gradient_accumulation_steps" in train:
        key = "train.gradient_accumulation_steps"
        what = f"{key} is ignored: it is derived from run.global_batch_size"
        document.warn(key, what, "remove one of them")
    if recipe.data.prompt_format == "raw" and train.get("completion_only_loss") is False:
        key = "train.completion_only_loss"
        document.warn(key, f"{key} false: the loss is on prompts too", "TRL's default: remove it")


def machine_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong on this machine with the recipe's own launch."""
    if wrong := no_model_at(recipe.model.name_or_path):
        yield document.error("model.name_or_path", *wrong)
    train, key = _written(recipe.train), "per_device_train_batch_size"
    per_device = train.get(key, upstream_default("train", key))
    try:
        launch = plan_launch(recipe.launch)
    except RecipeError:  # `recipe_rules` says it
        return
    if conflict := precision_conflict(
        train, launch.config.mixed_precision, launch.config.path.name
    ):
        yield document.error("launch.accelerate", *conflict)
    try:
        whole = recipe.run.global_batch_size or per_device * launch.world_size
        solve_batch(whole, per_device, launch.world_size)
    except RecipeError as error:
        yield document.error("run.global_batch_size", error.what, *error.hints)


def _written(section: Section | None) -> Values:
    return {} if section is None else section.model_dump(exclude_unset=True)


def _findings(recipe: RecipeFile, train: Values) -> Iterator[tuple[str, ...]]:
    key = "model.attn_implementation"
    wrapped = train.get("packing") and train.get("packing_strategy") == "wrapped"
    if recipe.model.attn_implementation == VARLEN and (
        wrapped or train.get("padding_free") is False
    ):
        why = "wrapped rows" if wrapped else "padding_free: false"
        yield key, f"{key}: {VARLEN} under {why} would silently be sdpa", "remove one of them"
    for name in recipe.model.kwargs.keys() & _NOT_IN_MODEL_KWARGS:
        hint = "a key of model (recipes explain model), quantization or the launcher decides it"
        yield f"model.kwargs.{name}", f"model.kwargs.{name} cannot be set there", hint
    key, targets = "lora.target_modules", _written(recipe.lora).get("target_modules")
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        what = f"{key} holds lm_head: the loss cannot run through an adapter on the output layer"
        yield key, what, "remove lm_head"
    elif isinstance(targets, str) and re.fullmatch(r"(?!all-linear$)[\w\s,.-]*", targets):
        # as a pattern of whole names, it has nothing that could stand for a layer's number
        listed = ", ".join(re.findall(r"[\w.-]+", targets))
        yield key, f"{key}: the pattern {targets!r} matches no module", f"write a list: [{listed}]"
    quantization = _written(recipe.quantization)
    four, eight = (quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if recipe.quantization is not None and four == eight:
        hint = "set load_in_4bit: true or load_in_8bit: true, or remove the section"
        yield "quantization", "quantization must turn on one of 4 and 8 bits", hint
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
    strategy, split = train.get("eval_strategy", "no"), recipe.data.split
    if strategy != "no" and (split.method == "none" or split.validation == 0):
        what = f"train.eval_strategy is {strategy}, but data.split holds no validation rows out"
        hint = "set data.split.validation, or train.eval_strategy: no"
        yield "train.eval_strategy", what, hint


def no_model_at(name: str) -> tuple[str, ...] | None:
    """Return what is wrong with a model's name, and a hint; None for a folder and a Hub id."""
    path = Path(name)
    if is_packaged(name) or path.is_dir():
        return None
    if path.is_file() or name.endswith(".gguf"):
        return f"'{name}' is a file", A_MODEL
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return f"no such folder: {name}", "a relative path starts at the working directory"
    if not HUB_ID.fullmatch(name):
        return f"{name!r} is not a folder here, and cannot be a name on the Hub", A_MODEL
    return None
