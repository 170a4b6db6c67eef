"""A recipe: sections as values, each with the place it was written.

`load_recipe` is the only way in. A resolved recipe is a recipe: `resolved.yaml` has every value,
absolute paths and no `extends`, and is what jobs, resumed runs and evaluations read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field

from recipes_lib.config.documents import Document, Origin, QuickSection, dotted, judge, parse, read
from recipes_lib.config.rules import base_rules, machine_rules, recipe_rules
from recipes_lib.config.sections import (
    DataSection,
    LaunchSection,
    ModelSection,
    RunSection,
    SplitSection,
)
from recipes_lib.config.suggestions import near_names
from recipes_lib.config.upstream import (
    TRAIN_DEFAULTS,
    LoraSection,
    QuantizationSection,
    TrainSection,
)
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name

RECIPE_FILE = "resolved.yaml"
PROJECT_DEFAULT = Origin("project default")
UPSTREAM_DEFAULT = Origin("default")


class RecipeFile(QuickSection):
    """A fine-tuning recipe."""

    kind: ClassVar = "recipe"

    model: ModelSection
    quantization: QuantizationSection | None = Field(
        None,
        description="`transformers.BitsAndBytesConfig`, key by key. Absent or null: the weights are"
        " not quantised.",
    )
    lora: LoraSection | None = Field(
        None, description="`peft.LoraConfig`, key by key. Absent or null: full fine-tuning."
    )
    data: DataSection
    train: TrainSection = Field(TrainSection(), description="`trl.SFTConfig`, key by key.")
    run: RunSection = RunSection()
    launch: LaunchSection = LaunchSection()


@lru_cache(maxsize=1)
def recipe_keys() -> dict[str, dict[str, Any]]:
    """Return dotted key -> JSON Schema, with text and default, of every section and key."""
    root = RecipeFile.model_json_schema()
    found: dict[str, dict[str, Any]] = {}

    def visit(schema: dict[str, Any], prefix: str) -> None:
        for key, part in schema.get("properties", {}).items():
            known = [one["$ref"] for one in (part, *part.get("anyOf", [])) if "$ref" in one]
            inner = root["$defs"][known[0].rpartition("/")[2]] if len(known) == 1 else {}
            found[f"{prefix}{key}"] = {**inner, **part}
            visit(inner, f"{prefix}{key}.")

    visit(root, "")
    return found


def near_keys(word: str) -> list[str]:
    """Return the dotted keys that a word such as `learning_rate` means, or else is nearest to."""
    keys, plain = recipe_keys(), word.replace("-", "_")
    ending = [key for key in keys if key == plain or key.endswith(f".{plain}")]
    if ending:
        return ending
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    names = near_names(plain, keys) or near_names(plain.rpartition(".")[2], last)
    return [last.get(name, name) for name in names]


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    `train` holds what goes to `SFTConfig`: the recipe's keys and the project's defaults. `name` is
    the run's name, `text` the recipe's file, `values` what was written, `origins` where each dotted
    key was. Paths are absolute.
    """

    path: Path
    name: str
    model: ModelSection
    data: DataSection
    run: RunSection
    launch: LaunchSection
    train: dict[str, Any]
    lora: dict[str, Any] | None
    quantization: dict[str, Any] | None
    origins: Mapping[str, Origin]
    warnings: tuple[RecipeError, ...]
    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

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

    def resolved_yaml(self) -> str:
        """Return `to_dict` as YAML: a recipe that is the same anywhere."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Return the recipe of a `resolved.yaml`."""
        return load_recipe(path)

    def write(self, path: Path) -> None:
        """Write the resolved recipe."""
        write_text(path, self.resolved_yaml())

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
        return self.origins.get(key, PROJECT_DEFAULT if ours else UPSTREAM_DEFAULT)

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written; for a default, where its section or else
        the recipe is.
        """
        above = (key.rsplit(".", levels)[0] for levels in range(key.count(".") + 1))
        written = (self.origins[key] for key in above if key in self.origins)
        origin = next(written, Origin(str(self.path)))
        return RecipeError(what, *hints, file=origin.file, line=origin.line)

    def fault(self, key: str, what: str, *hints: str) -> EnvironmentFault:
        """Return an error of the machine, placed where `key` asks for what it has not."""
        origin = self.origin_of(key)
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
    return recipe_of(parse(RecipeFile, document, base_rules, recipe_rules), document)


def check_recipe(document: Document) -> tuple[RecipeFile | None, list[RecipeError]]:
    """Return what `recipes check` says of a recipe or a base."""
    if document.path.name.startswith("_"):
        return judge(RecipeFile, document, base_rules, partial=True)
    return judge(RecipeFile, document, base_rules, recipe_rules, machine_rules)


def recipe_of(file: RecipeFile, document: Document) -> Recipe:
    """Return the recipe of a document that was parsed.

    Raises:
        RecipeError: the run's name cannot be a folder's.
    """
    values, origin = document.values, document.origin("run.name")
    name = file.run.name or f"{document.path.resolve().parent.name}--{document.path.stem}"
    return Recipe(
        path=document.path,
        name=check_run_name(name, origin.file, origin.line),
        model=file.model,
        data=file.data,
        run=file.run,
        launch=file.launch,
        train={**TRAIN_DEFAULTS, **values.get("train", {})},
        lora=values.get("lora"),
        quantization=values.get("quantization"),
        origins={dotted(path): origin for path, origin in document.origins.items()},
        warnings=tuple(document.warnings),
        text=document.text,
        values=values,
    )
