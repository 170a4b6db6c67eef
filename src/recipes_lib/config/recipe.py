"""A recipe that passed stage 1: sections as values, each with the place it was written.

`load_recipe` is the only way in; `upstream` turns the result into TRL's, PEFT's and bitsandbytes'
own objects.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes_lib.config.loader import Document, Origin, run_name
from recipes_lib.config.sections import (
    HUB_ID,
    TRAIN_DEFAULTS,
    TRL,
    DataSection,
    FiltersSection,
    LaunchSection,
    ModelSection,
    RunSection,
    SplitSection,
    data_format,
    is_inline,
)
from recipes_lib.config.validation import dotted, load
from recipes_lib.config.yaml_source import no_such_file
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import recipe_path

RECIPE_FILE = "recipe.json"
HANDED = "RECIPES_HANDED_RECIPE"  # the file in which a process finds the recipe of its command line
PROJECT_DEFAULT = Origin("project default")
UPSTREAM_DEFAULT = Origin("default")
_UNCHOSEN = object()
_FREE_MAPPINGS = {"model.kwargs", "data.columns"}
_PATHS = ("source", "chat_template")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    `train` holds what goes to `SFTConfig`: the recipe's keys and the project's defaults. `name` is
    the run's name, `text` the recipe's file, `origins` where each dotted key was written. The paths
    of `data` are absolute; `as_written` holds those keys of `data` whose paths were written
    otherwise, for what is shown, recorded and compared.
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
    as_written: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def base_format(self) -> str | None:
        """What the base's linear layers are quantized to: 4-bit or 8-bit; None where they are in
        `model.dtype`.
        """
        if self.quantization is None:
            return None
        return "8-bit" if self.quantization.get("load_in_8bit") else "4-bit"

    def to_dict(self) -> dict[str, Any]:
        """Return all resolved sections as plain nested values: paths as they were written, our
        sections with their defaults.
        """
        values = self._values()
        values["data"] |= self.as_written
        return values

    def resolved_yaml(self) -> str:
        """Return `to_dict` as YAML, which a run keeps as resolved.yaml."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def _values(self) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.model),
            "quantization": self.quantization,
            "lora": self.lora,
            "data": dataclasses.asdict(self.data),
            "train": dict(self.train),
            "run": {**dataclasses.asdict(self.run), "name": self.name},
            "launch": dataclasses.asdict(self.launch),
        }

    def write(self, path: Path) -> None:
        """Write the recipe for another process: values, and as text where each was written."""
        write_json(
            path,
            {
                "path": str(self.path),
                "values": self._values(),
                "as_written": dict(self.as_written),
                "origins": {key: str(at) for key, at in self.origins.items()},
                "warnings": [
                    [one.what, one.hints, str(Origin(str(one.file), one.line))]
                    for one in self.warnings
                ],
                "text": self.text,
            },
        )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Return the recipe that `write` wrote.

        Raises:
            DamagedFile: the file is not what was written.
        """
        stored = read_object(path)
        try:
            return _recipe_of(
                stored["values"],
                path=Path(stored["path"]),
                name=stored["values"]["run"]["name"],
                origins={key: Origin.of(at) for key, at in stored["origins"].items()},
                warnings=tuple(
                    RecipeError(what, *hints, file=Origin.of(at).file, line=Origin.of(at).line)
                    for what, hints, at in stored["warnings"]
                ),
                as_written=stored["as_written"],
                text=stored["text"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"is damaged, or of another version: {type(error).__name__}: {error}"
            raise DamagedFile(what, file=path) from None

    def reading(self, file: str) -> Recipe:
        """Return the recipe that reads all rows of a file in the format of its own, and holds none
        of them out.
        """
        split = SplitSection(method="none")
        data = dataclasses.replace(self.data, source=file, split=split, max_examples=None)
        # no split is wanted of the file, so no validation may be asked for
        train = self.train | {"eval_strategy": "no", "load_best_model_at_end": False}
        return dataclasses.replace(self, data=data, train=train)

    def written_values(self) -> dict[str, Any]:
        """Return the sections with the values somebody chose (a file, the command line, the
        project), without defaults.
        """
        sections = {name: self._chosen(name, value) for name, value in self.to_dict().items()}
        return {name: value for name, value in sections.items() if value is not _UNCHOSEN}

    def _chosen(self, key: str, value: Any) -> Any:
        if isinstance(value, dict) and key not in _FREE_MAPPINGS:
            inner = {name: self._chosen(f"{key}.{name}", item) for name, item in value.items()}
            return {name: it for name, it in inner.items() if it is not _UNCHOSEN} or _UNCHOSEN
        return value if self.origin_of(key) != UPSTREAM_DEFAULT else _UNCHOSEN

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
    """Load and check a recipe (stage 1: no torch).

    Args:
        overrides: `section.key=value` words from the command line.

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    return recipe_from(load(recipe_path(path), "recipe", overrides))


def handed_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe as the process that started this one resolved it, or as a `recipe.json`
    holds it; else as `load_recipe`.

    Raises:
        RecipeError: overrides of a recipe that is resolved.
    """
    if handed := os.environ.get(HANDED):
        return Recipe.read(Path(handed))
    if Path(path).suffix != ".json":
        return load_recipe(path, overrides)
    if overrides:
        what = f"is a resolved recipe: {overrides[0]} cannot change it"
        raise RecipeError(what, "override the recipe's YAML file, or launch it again", file=path)
    if not Path(path).is_file():
        raise no_such_file(Path(path), path)
    return Recipe.read(Path(path))


def recipe_from(document: Document) -> Recipe:
    """Return the recipe of a document that passed `validate`."""
    values = document.values
    written = {key: value for key, value in values["data"].items() if key in _PATHS}
    absolute = _absolute_paths(document, written)
    return _recipe_of(
        {**values, "data": {**values["data"], **absolute}},
        path=document.path,
        name=run_name(document),
        origins={dotted(path): origin for path, origin in document.origins.items()},
        warnings=tuple(document.warnings),
        as_written={key: value for key, value in written.items() if value != absolute[key]},
        text=document.text,
    )


def _recipe_of(values: Mapping[str, Any], **facts: Any) -> Recipe:
    """Return a recipe with the sections that `values` holds."""
    data = dict(values["data"])
    data["split"] = SplitSection(**data.get("split", {}))
    data["filters"] = FiltersSection(**data.get("filters", {}))
    return Recipe(
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
        **facts,
    )


def _absolute_paths(document: Document, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paths of `data` made absolute: looked for beside the file that wrote them, then in
    the working directory. Hub ids and inline templates stay.
    """
    beside = {key: document.folder(("data", key)) for key in _PATHS}

    def source(entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {**entry, "source": source(entry["source"])} if "source" in entry else entry
        if not isinstance(entry, str) or not entry:
            return entry
        is_file = data_format(Path(entry)) or not HUB_ID.fullmatch(entry)
        return _absolute(entry, (beside["source"],), keep_missing=not is_file)

    paths = dict(written)
    if "source" in written:
        given = written["source"]
        paths["source"] = (
            [source(one) for one in given] if isinstance(given, list) else source(given)
        )
    template = written.get("chat_template")
    in_a_file = isinstance(template, str) and not template.startswith(TRL)
    if template and in_a_file and not is_inline(template):
        places = (beside["chat_template"], beside["source"])
        paths["chat_template"] = _absolute(template, places)
    return paths


def _absolute(name: str, folders: Sequence[Path], *, keep_missing: bool = False) -> str:
    """Return the absolute path of what `name` means in the first folder that has it; links in it
    are kept.
    """
    path = Path(name).expanduser()
    places = [folder / path for folder in (*folders, Path.cwd())]
    found = next(filter(os.path.exists, places), None)
    if found is None and keep_missing:
        return name
    place = found or places[0]
    normal = Path(os.path.abspath(place))  # noqa: PTH100 (resolve would follow links)
    if found is not None and not (normal.exists() and normal.samefile(place)):
        return str(place.absolute())  # a/link/.. need not be a
    return str(normal)
