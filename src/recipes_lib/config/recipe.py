"""A recipe that passed stage 1: sections as values, each with the place it was written.

`load_recipe` is the only way in; `upstream` turns the result into TRL's, PEFT's and bitsandbytes'
own objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.config.defaults import TRAIN_DEFAULTS
from recipes_lib.config.loader import Document, Origin, folder_of, nearest_origin, run_name
from recipes_lib.config.sections import (
    DataSection,
    FiltersSection,
    LaunchSection,
    ModelSection,
    RunSection,
    SplitSection,
)
from recipes_lib.config.validation import load
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.project import recipe_path

PROJECT_DEFAULT = Origin("project default")
UPSTREAM_DEFAULT = Origin("default")
_UNCHOSEN = object()
_FREE_MAPPINGS = {("model", "kwargs"), ("data", "columns")}


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    `train` holds what goes to `SFTConfig`: the recipe's keys and the project's defaults. `name` is
    the run's name. `base_dir` is the folder that relative data paths mean: the one of the file that
    wrote `data.source`, or the working directory for an override. `levels` counts the levels of
    `extends` above it.
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
    origins: Mapping[KeyPath, Origin]
    warnings: tuple[RecipeError, ...]
    base_dir: Path
    levels: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all resolved sections as plain nested values, our sections with their defaults."""
        ours = {
            name: dataclasses.asdict(getattr(self, name))
            for name in ("model", "data", "run", "launch")
        }
        ours["run"]["name"] = self.name
        return {
            "model": ours["model"],
            "quantization": self.quantization,
            "lora": self.lora,
            "data": ours["data"],
            "train": dict(self.train),
            "run": ours["run"],
            "launch": ours["launch"],
        }

    def written_values(self) -> dict[str, Any]:
        """Return the sections with the values somebody chose (a file, the command line, the
        project), without defaults.
        """
        sections = {name: self._chosen((name,), value) for name, value in self.to_dict().items()}
        return {name: value for name, value in sections.items() if value is not _UNCHOSEN}

    def _chosen(self, path: KeyPath, value: Any) -> Any:
        if isinstance(value, dict) and path not in _FREE_MAPPINGS:
            inner = {key: self._chosen((*path, key), item) for key, item in value.items()}
            return {key: item for key, item in inner.items() if item is not _UNCHOSEN} or _UNCHOSEN
        return value if self.origin_of(".".join(map(str, path))) != UPSTREAM_DEFAULT else _UNCHOSEN

    def origin_of(self, key: str) -> Origin:
        """Return where the value of a dotted key was written; a key nobody wrote has a default's
        origin.
        """
        path = _key_path(key)
        default = (
            PROJECT_DEFAULT
            if path[0] == "train" and path[-1] in TRAIN_DEFAULTS
            else UPSTREAM_DEFAULT
        )
        return self.origins.get(path, default)

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written; for a default, where its section or else
        the recipe is.
        """
        origin = nearest_origin(self.origins, _key_path(key), str(self.path))
        return RecipeError(what, *hints, file=origin.file, line=origin.line)

    def fault(self, key: str, what: str, *hints: str) -> EnvironmentFault:
        """Return an error of the machine, placed where `key` asks for what it has not."""
        origin = self.origin_of(key)
        return EnvironmentFault(what, *hints, file=origin.file, line=origin.line)

    def folder_of(self, key: str) -> Path:
        """Return the folder that a relative path under `key` is meant from."""
        return folder_of(self.origins, self.path, tuple(key.split(".")))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe (stage 1: no torch).

    Args:
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    return recipe_from(load(recipe_path(path), "recipe", overrides))


def recipe_from(document: Document) -> Recipe:
    """Return the recipe of a document that passed `validate`."""
    values = document.values
    data = dict(values["data"])
    data["split"] = SplitSection(**data.get("split", {}))
    data["filters"] = FiltersSection(**data.get("filters", {}))
    return Recipe(
        path=document.path,
        name=run_name(document),
        model=ModelSection(**values["model"]),
        data=DataSection(**data),
        run=RunSection(**values.get("run", {})),
        launch=LaunchSection(**values.get("launch", {})),
        train={
            **{key: default.value for key, default in TRAIN_DEFAULTS.items()},
            **values.get("train", {}),
        },
        lora=values.get("lora"),
        quantization=values.get("quantization"),
        origins=document.origins,
        warnings=tuple(document.warnings),
        levels=document.levels,
        base_dir=document.folder(("data", "source")),
    )


def _key_path(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))
