"""A recipe: sections as values, each with the place it was written, and what must hold between
them. `load_recipe` is the only way in.

A resolved recipe is a recipe: `resolved.yaml` has every value, absolute paths and no `extends`, and
is what jobs, resumed runs and evaluations read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar

import yaml

from recipes_lib.config import sections, upstream
from recipes_lib.config.documents import Document, Origin, Values, dotted, read
from recipes_lib.config.launch import plan_launch, precision_conflict, solve_batch
from recipes_lib.config.parsing import Schema, Section, judge, parse
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

    model: sections.ModelSection
    quantization: sections.QuantizationSection | None = None
    lora: upstream.LoraSection | None = None
    """`peft.LoraConfig`, key by key. Absent or null: full fine-tuning."""
    data: sections.DataSection
    train: upstream.TrainSection = upstream.TrainSection()
    """`trl.SFTConfig`, key by key."""
    run: sections.RunSection = sections.RunSection()
    launch: sections.LaunchSection = sections.LaunchSection()


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: paths are absolute, `train` has the project's defaults too."""

    document: Document
    name: str  # of the run
    model: sections.ModelSection
    data: sections.DataSection
    run: sections.RunSection
    launch: sections.LaunchSection
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
        values = {
            "source": file,
            "split": sections.SplitSection(method="none"),
            "max_examples": None,
        }
        # no split is wanted of the file, so no validation may be asked for
        train = self.train | {"eval_strategy": "no", "load_best_model_at_end": False}
        return replace(self, data=self.data.model_copy(update=values), train=train)

    def origin_of(self, key: str) -> Origin:
        """Return where the value of a dotted key was written, or that it is a default."""
        places = {dotted(path): place for path, place in self.document.origins.items()}
        ours = key.removeprefix("train.") in upstream.TRAIN_DEFAULTS
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
    values, origin, path = document.values, document.origin("run.name"), document.path.resolve()
    name = file.run.name or f"{path.parent.name}--{document.path.stem}"
    check_run_name(name, origin.file, origin.line)
    written = values.get("train")  # `recipes check` asks of bad ones, too
    train = upstream.TRAIN_DEFAULTS | (written if isinstance(written, dict) else {})
    parts = (file.model, file.data, file.run, file.launch, train)
    return Recipe(document, name, *parts, values.get("lora"), values.get("quantization"))


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


# What must hold between keys where upstream would be silently wrong, or say so late.

_NOT_IN_MODEL_KWARGS = {
    *("dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "revision", "token"),
    *("quantization_config", "device_map"),
}


def recipe_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what a recipe cannot mean; values of a wrong type were left out."""
    train, lora, quantization = map(_written, (recipe.train, recipe.lora, recipe.quantization))
    for name in recipe.model.kwargs.keys() & _NOT_IN_MODEL_KWARGS:
        hint = "a key of model (recipes explain model), quantization or the launcher decides it"
        key = f"model.kwargs.{name}"
        yield document.error(key, f"{key} cannot be set there", hint)
    key = "model.attn_implementation"
    wrapped = train.get("packing") and train.get("packing_strategy") == "wrapped"
    padded = train.get("padding_free") is False
    if recipe.model.attn_implementation == sections.VARLEN and (wrapped or padded):
        why = "wrapped rows" if wrapped else "padding_free: false"
        what = f"{key}: {sections.VARLEN} under {why} would silently be sdpa"
        yield document.error(key, what, "remove one of them")
    key = "train.gradient_accumulation_steps"
    if recipe.run.global_batch_size and "gradient_accumulation_steps" in train:
        yield document.error(key, f"{key}: run.global_batch_size decides it", "remove one of them")
    key, targets = "lora.target_modules", lora.get("target_modules")
    if "lm_head" in (targets if isinstance(targets, list) else [targets]):
        what = f"{key} holds lm_head: the loss cannot run through an adapter on the output layer"
        yield document.error(key, what, "remove lm_head")
    elif isinstance(targets, str) and re.fullmatch(r"(?!all-linear$)[\w\s,.-]*", targets):
        # as a pattern of whole names, it has nothing that could stand for a layer's number
        listed = ", ".join(re.findall(r"[\w.-]+", targets))
        what = f"{key}: the pattern {targets!r} matches no module"
        yield document.error(key, what, f"write a list: [{listed}]")
    four, eight = (quantization.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if recipe.quantization is not None and four == eight:
        hint = "set load_in_4bit: true or load_in_8bit: true, or remove the section"
        yield document.error("quantization", "quantization must turn on one of 4 and 8 bits", hint)
    elif recipe.quantization is not None and recipe.lora is None:
        what = "quantized weights cannot be trained without an adapter"
        yield document.error("quantization", what, "add a lora section, or remove quantization")
    # A 4-bit layer answers in the base's precision; where autocast's is the other half, the next
    # concatenation ends the run.
    dtype, under = recipe.model.dtype, "train.fp16" if train.get("fp16") else "train.bf16"
    half = "float16" if train.get("fp16") else "bfloat16" if train.get("bf16", True) else dtype
    if four and dtype in ("float16", "bfloat16") and dtype != half:
        what = f"model.dtype {dtype} under {under}: torch refuses to mix the two in 4-bit layers"
        yield document.error("model.dtype", what, f"set model.dtype: {half}")
    key, split = "train.eval_strategy", recipe.data.split
    held_out = split.validation if split.method != "none" else 0
    if train.get("eval_strategy", "no") != "no" and not held_out:
        what = f"{key} is {train['eval_strategy']}, but data.split holds no validation rows out"
        hint = "set data.split.validation, or train.eval_strategy: no"
        yield document.error(key, what, hint)
    name = "unnamed" if recipe.run.name is None else recipe.run.name
    checks: dict[str, Callable[[], object]] = {
        "launch.accelerate": lambda: plan_launch(recipe.launch),
        "run.name": lambda: check_run_name(name),
    }
    for key, check in checks.items():
        try:
            check()
        except RecipeError as error:
            for wrong in error.errors:
                yield document.error(key, wrong.what, *wrong.hints)


def machine_rules(recipe: RecipeFile, document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong on this machine with the recipe's model, default launch and rows."""
    if wrong := no_model_at(recipe.model.name_or_path):
        yield document.error("model.name_or_path", *wrong)
    train, key = _written(recipe.train), "per_device_train_batch_size"
    per_device = train.get(key, upstream.upstream_default("train", key))
    try:
        launch = plan_launch(recipe.launch)
    except RecipeError:  # `recipe_rules` says it
        return
    config = launch.config
    if conflict := precision_conflict(train, config.mixed_precision, config.path.name):
        yield document.error("launch.accelerate", *conflict)
    whole = recipe.run.global_batch_size or per_device * launch.world_size
    try:
        solve_batch(whole, per_device, launch.world_size)
    except RecipeError as error:
        yield document.error("run.global_batch_size", error.what, *error.hints)
    source, split = Path(str(recipe.data.source)), recipe.data.split
    if source.suffix in (".jsonl", ".ndjson", ".csv", ".tsv") and source.is_file():
        with source.open("rb") as stream:
            most = sum(1 for _ in islice(filter(bytes.strip, stream), whole + 2))
        if split.method != "none":  # a small data set has a row of each split
            most -= (split.validation > 0) + (split.test > 0)
        if most < whole and train.get("packing_strategy") != "wrapped":
            what = f"{most} training rows do not fill one step of {whole}: nothing would be trained"
            yield document.error("data.source", what, "give more rows, or set a smaller batch")


def _written(section: Section | None) -> Values:
    return {} if section is None else section.model_dump(exclude_unset=True)


def no_model_at(name: str) -> tuple[str, ...] | None:
    """Return what is wrong with a model's name, and a hint; None for a folder and a Hub id."""
    path = Path(name)
    if is_packaged(name) or path.is_dir():
        return None
    if path.is_file() or name.endswith(".gguf"):
        return f"'{name}' is a file", A_MODEL
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return f"no such folder: {name}", "a relative path starts at the working directory"
    if not sections.HUB_ID.fullmatch(name):
        return f"{name!r} is not a folder here, and cannot be a name on the Hub", A_MODEL
    return None
