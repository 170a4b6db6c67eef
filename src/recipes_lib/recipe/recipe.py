"""A recipe that passed stage 1: sections as values, each with the place it was written.

`load_recipe` is the only way in; `upstream` turns the result into TRL's, PEFT's and bitsandbytes' own objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.errors import RecipeError, RecipeErrors
from recipes_lib.recipe.defaults import TRAIN_DEFAULTS
from recipes_lib.recipe.loader import COMMAND_LINE, Document, Origin, load_document
from recipes_lib.recipe.project import check_run_name
from recipes_lib.recipe.sections import DataSection, FiltersSection, LaunchSection, ModelSection, RunSection, SplitSection
from recipes_lib.recipe.yaml_source import KeyPath

PROJECT_DEFAULT = Origin("project default")
UPSTREAM_DEFAULT = Origin("default")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    `train` holds what goes to `SFTConfig`: the recipe's keys and the project's defaults. `name` is the run's name. `base_dir` is
    the folder that relative data paths mean: the one of the file that wrote `data.source`, or the working directory for an override.
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

    def to_dict(self) -> dict[str, Any]:
        """Return all resolved sections as plain nested values, our sections with their defaults."""
        ours = {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "data", "run", "launch")}
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

    def origin_of(self, key: str) -> Origin:
        """Return where the value of a dotted key was written; a key nobody wrote has a default's origin.

        A key inside a written mapping or list has the origin of the nearest one above it.
        """
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        if path in self.origins:
            return self.origins[path]
        if path[0] == "train" and len(path) > 1 and path[1] in TRAIN_DEFAULTS and path[:2] not in self.origins:
            return PROJECT_DEFAULT
        for length in range(len(path) - 1, 1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return UPSTREAM_DEFAULT

    def error(self, key: str, what: str, *hints: str) -> RecipeError:
        """Return an error placed where `key` was written, or at the recipe when a default is at fault."""
        origin = self.origin_of(key)
        if origin in (PROJECT_DEFAULT, UPSTREAM_DEFAULT):
            origin = self.origins.get((key.split(".")[0],), Origin(str(self.path)))
        return RecipeError(what, *hints, file=origin.file, line=origin.line)

    def folder_of(self, key: str) -> Path:
        """Return the folder that a relative path under `key` is meant from."""
        return _folder(self.origins, self.path, tuple(key.split(".")))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe (stage 1: no torch).

    Args:
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    from recipes_lib.recipe.validation import validate

    document = load_document(path, overrides)
    errors = validate(document, expected="recipe")
    if errors:
        raise RecipeErrors(errors)
    return recipe_from(document)


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
        train={**{key: default.value for key, default in TRAIN_DEFAULTS.items()}, **values.get("train", {})},
        lora=values.get("lora"),
        quantization=values.get("quantization"),
        origins=document.origins,
        warnings=tuple(document.warnings),
        base_dir=_folder(document.origins, document.path, ("data", "source")),
    )


def run_name(document: Document) -> str:
    """Return the run's name: `run.name`, else `<folder>--<file stem>`.

    Raises:
        RecipeError: the name cannot be a folder name.
    """
    given = (document.values.get("run") or {}).get("name")
    origin = document.origin(("run", "name"))
    name = f"{document.path.resolve().parent.name}--{document.path.stem}" if given is None else given
    return check_run_name(name, origin.file, origin.line)


def _folder(origins: Mapping[KeyPath, Origin], path: Path, key: KeyPath) -> Path:
    """Return the folder of the file that wrote `key`; the working directory for the command line."""
    origin = origins.get(key)
    if origin is None:
        return path.parent
    return Path.cwd() if origin.file == COMMAND_LINE else Path(origin.file).parent
