"""A study file as an object: its arms with their recipes resolved, the declared factors, seeds and
evals. Needs no torch.

`load_study` is the only way in. What is wrong with a study, and with every recipe and eval it
names, is reported at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.design_check import (
    between_keys,
    check_eval_names,
    check_levels,
    check_overrides,
    with_whole_arms,
)
from recipes_lib.compare.design_sections import BASE_ARM, ArmSection
from recipes_lib.compare.published import load_published
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.check import check_upstream
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.loader import COMMAND_LINE, Document, Origin, load_document
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.config.sections import LaunchSection
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, describe, load, shown
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import project_root, recipe_path, shown_path
from recipes_lib.suites.recipe import EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

if TYPE_CHECKING:
    from jsonschema import ValidationError

# Values that follow from the accelerate config: a factor that may change the one may change the
# others.
_OF_ACCELERATE = ("launch.distributed_type", "launch.mixed_precision")


@dataclass(frozen=True)
class Arm:
    """One variant.

    `recipe` has the overrides applied; it is None for an imported or published arm that names none.
    `accelerate`, `gpus` (processes on each machine) and `nodes` are the launch as it will be.
    """

    name: str
    recipe: Recipe | None
    overrides: tuple[str, ...]
    launch: Launch
    seeds: tuple[int, ...]
    cell: Mapping[str, str] = field(default_factory=dict)
    imported: str | None = None
    published_only: bool = False

    @property
    def accelerate(self) -> str:
        """Name of the accelerate config."""
        return self.launch.config.path.stem

    @property
    def gpus(self) -> int:
        """Processes on each machine."""
        return self.launch.per_machine

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.launch.machines

    @property
    def own_seed(self) -> int:
        """The seed that the recipe names."""
        return int(self.recipe.train.get("seed", 42)) if self.recipe else 42

    @property
    def trained(self) -> bool:
        """Whether the study trains this arm itself."""
        return self.imported is None and not self.published_only

    @property
    def world_size(self) -> int:
        """Processes of a training of this arm."""
        return self.launch.world_size

    def resolved(self) -> dict[str, Any]:
        """Return every resolved value by dotted key, the launch as it will be among them.

        The run's name and notes are left out; `train.seed` is a list where the arm has several.
        Empty without a recipe.
        """
        if self.recipe is None:
            return {}
        values = flatten(self.recipe.to_dict())
        for key in ("run.name", "run.notes", "run.tags"):
            values.pop(key, None)
        launch = {
            "accelerate": self.accelerate,
            "gpus": self.gpus,
            "nodes": self.nodes,
            "distributed_type": self.launch.distributed_type,
            "world_size": self.world_size,
            "mixed_precision": self.launch.config.mixed_precision,
        }
        seeds: Any = list(self.seeds)
        return {
            **values,
            "train.seed": seeds[0] if len(seeds) == 1 else seeds,
            **{f"launch.{key}": value for key, value in launch.items()},
        }


@dataclass(frozen=True)
class Study:
    """A study that passed its check. `name` is the stem of its file, and the name of its folder
    under runs/.
    """

    path: Path
    name: str
    question: str
    factors: Mapping[str, tuple[str, ...]]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    include_base: bool
    evals: tuple[EvalRecipe, ...]
    published: Path | None
    origins: Mapping[KeyPath, Origin]
    warnings: tuple[RecipeError, ...] = ()
    words: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        """Return the arm of that name.

        Raises:
            RecipeError: there is none; the arms are listed.
        """
        found = next((arm for arm in self.arms if arm.name == name), None)
        if found is None:
            names = [arm.name for arm in self.arms]
            raise RecipeError(
                f"study '{self.name}' has no arm '{name}'",
                *did_you_mean(name, names),
                f"arms: {', '.join(names)}",
            )
        return found

    def factor_of(self, key: str) -> str | None:
        """Return the declared factor that may change a dotted key, or None: a difference there is a
        confound.
        """
        for factor, prefixes in self.factors.items():
            for prefix in prefixes:
                if (
                    key == prefix
                    or key.startswith(f"{prefix}.")
                    or (prefix == "launch.accelerate" and key in _OF_ACCELERATE)
                ):
                    return factor
        return None

    def missing_cells(self) -> list[Mapping[str, str]]:
        """Return the cells of the full factorial that no arm has; none with fewer than two
        factors.
        """
        if len(self.factors) < 2:
            return []
        cells = [dict(arm.cell) for arm in self.arms if set(self.factors) <= set(arm.cell)]
        levels = [list(dict.fromkeys(cell[factor] for cell in cells)) for factor in self.factors]
        every = (
            dict(zip(self.factors, levels, strict=True)) for levels in itertools.product(*levels)
        )
        return [cell for cell in every if cell not in cells]

    def differing(self) -> dict[str, dict[str, Any]]:
        """Return {dotted key: {arm: value}} of the keys whose resolved values differ between arms;
        arms without a recipe are left out.
        """
        resolved = {arm.name: arm.resolved() for arm in self.arms if arm.recipe is not None}
        keys = dict.fromkeys(key for values in resolved.values() for key in values)
        table = {key: {name: values.get(key) for name, values in resolved.items()} for key in keys}
        return {
            key: values
            for key, values in table.items()
            if any(value != next(iter(values.values())) for value in values.values())
        }


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Load and check a study, its arms' recipes and its evals (stage 1: no torch).

    Args:
        path: the study file, or its short name in recipes/studies/.
        overrides: words from the command line: `section.key=value` for every arm's recipe, or
            `key=value` for the study's own keys (`seeds=[1,2]`, `gpus=2`).

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    words = [
        word
        for word in overrides
        if word.removeprefix("--").partition("=")[0].partition(".")[0] in SECTIONS
    ]
    file = study_path(path)
    if not file.exists() and file.suffix not in (".yaml", ".yml"):
        shipped = sorted(
            file.stem for file in (project_root() / "recipes" / "studies").glob("*.yaml")
        )
        raise RecipeError(
            f"there is no study '{path}'",
            f"studies: {', '.join(shipped)}, or the path of a study file",
        )
    study, errors = _read(
        load(file, "study", [word for word in overrides if word not in words]), words
    )
    if errors:
        raise RecipeErrors(errors)
    return dataclasses.replace(study, words=tuple(overrides))


def study_path(name: str | Path) -> Path:
    """Return the file that a path or a short name (`quickstart`, `lora-rank`) means."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    places = [
        folder / "recipes" / "studies" / f"{path.name}.yaml" for folder in (Path(), project_root())
    ]
    return next((place for place in places if place.is_file()), path)


def study_file(word: str) -> Path | None:
    """Return the file of a study given as the commands take recipes and studies: by path or short
    name. None where the word is no study.
    """
    path = recipe_path(word)
    if path.is_dir():
        return None
    path = path if path.is_file() else study_path(word)
    return (
        path
        if path.is_file() and load_document(path, keep_going=True).kind.name == "study"
        else None
    )


class StudyRules(KindRules):
    """Rules of studies, whose top-level keys are values and no sections."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with every bare path of an arm written as `{recipe: path}`."""
        return with_whole_arms(values)

    def unknown(self, document: Document, path: KeyPath, known: list[str]) -> RecipeError:
        """Return the error for a key that does not exist here."""
        if len(path) > 1:
            return super().unknown(document, path, known)
        near = did_you_mean(str(path[0]), known)
        return document.error(
            path, f"unknown key '{path[0]}'", *near, f"keys of a study: {', '.join(known)}"
        )

    def wrong(self, document: Document, path: KeyPath, error: ValidationError) -> RecipeError:
        """Return the error for a value that the schema refuses."""
        if len(path) > 1:
            return super().wrong(document, path, error)
        if error.validator == "minProperties":
            return document.error(path, f"{path[0]} is empty")
        return document.error(
            path, f"{path[0]} must be {describe(error.schema)}, got {shown(error.instance)}"
        )

    def between_keys(self, document: Document) -> Iterator[RecipeError]:
        """Yield what is wrong between the study's own values."""
        return between_keys(document)

    def further(self, document: Document, full: bool, sound: bool) -> list[RecipeError]:
        """Return what is wrong with the recipes and evals it names; `full` adds stage 2 for every
        arm's recipe.
        """
        if not sound:
            return []
        study, errors = _read(document, [])
        if errors or not full:
            return errors
        found = {
            str(error): error
            for arm in study.arms
            if arm.recipe
            for error in check_upstream(arm.recipe, notes=[])
        }
        return list(found.values())


def _read(document: Document, words: Sequence[str]) -> tuple[Study, list[RecipeError]]:
    """Return the study of a document whose own values are sound, and what is wrong with the files
    it names.
    """
    values = document.values
    reader = _Reader(document, words)
    arms = tuple(filter(None, (reader.arm(name, value) for name, value in values["arms"].items())))
    evals = tuple(
        filter(None, (reader.eval(position) for position in range(len(values.get("evals") or []))))
    )
    factors = {name: tuple(keys) for name, keys in (values.get("factors") or {}).items()}
    own_base = any(arm.name == BASE_ARM for arm in arms)
    study = Study(
        path=document.path,
        name=document.path.stem,
        question=values["question"],
        factors=factors,
        arms=arms,
        seeds=tuple(dict.fromkeys(seed for arm in arms for seed in arm.seeds)),
        include_base=values.get("include_base", True)
        and not own_base
        and any(arm.trained for arm in arms),
        evals=evals,
        published=(
            document.folder(("published",)) / values["published"]
            if values.get("published")
            else None
        ),
        origins=document.origins,
        warnings=tuple(document.warnings),
    )
    reader.published(study.published)
    reader.check_words(arms)
    problems = list({str(error): error for error in reader.errors}.values()) or check_eval_names(
        document, [one.name for one in evals]
    )
    if not problems:
        problems = [*reader.one_base(study), *check_levels(document, study)]
    return dataclasses.replace(study, warnings=tuple(document.warnings)), problems


def _alike(path: Path) -> list[str]:
    """Which file of that folder was meant."""
    return did_you_mean(path.name, [file.name for file in path.parent.glob("[!_]*.yaml")])


class _Reader:
    """Reads what a study names, collecting errors instead of stopping."""

    def __init__(self, document: Document, words: Sequence[str]) -> None:
        self.document, self.words = document, list(words)
        self.errors: list[RecipeError] = []

    def arm(self, name: str, value: Any) -> Arm | None:
        """Return an arm, or None where its recipe or launch cannot be had."""
        section = ArmSection(**({"recipe": value} if isinstance(value, str) else value))
        study = self._shared(section)
        self._check_reach(name, section)
        own = [*(study.get("overrides") or []), *section.overrides, *(self.words if study else [])]
        self.errors += [self._at_override(name, error) for error in check_overrides(own)]
        recipe = self._recipe(name, section, own)
        if recipe is None and section.recipe is not None:
            return None
        launch = self._launch(name, section, recipe)
        if launch is None:
            return None
        arm = Arm(
            name=name,
            recipe=recipe,
            overrides=tuple(own),
            launch=launch,
            seeds=(),
            cell=dict(section.cell),
            imported=section.imported,
            published_only=section.published_only,
        )
        return dataclasses.replace(
            arm, seeds=tuple(section.seeds or study.get("seeds") or [arm.own_seed])
        )

    def _shared(self, section: ArmSection) -> dict[str, Any]:
        """What the study says for all arms; of one that was trained elsewhere it changes nothing,
        or its differences could be hidden.
        """
        return (
            self.document.values if section.imported is None and not section.published_only else {}
        )

    def _check_reach(self, name: str, section: ArmSection) -> None:
        """Refuse words of the command line that would change the other arms and not this one, which
        has a value of its own.
        """
        for key in ("accelerate", "gpus", "nodes", "seeds"):
            own, word = getattr(section, key), self._shared(section).get(key)
            if own and word and own != word and self.document.origin((key,)).file == COMMAND_LINE:
                what = (
                    f"arm '{name}' has its own {key}: {own}, so {key}={word} on the command line"
                    " does not reach it"
                )
                self.errors.append(
                    self.document.error(
                        ("arms", name, key), what, "change the study file, or leave that word away"
                    )
                )

    def _launch(self, name: str, section: ArmSection, recipe: Recipe | None) -> Launch | None:
        """Return the arm's launch, once it can work: a config that exists, processes that it
        starts, a batch that can be divided.
        """
        if recipe is None:  # nothing is launched
            return plan_launch(LaunchSection(), "single_gpu")
        study = self._shared(section)
        options = {
            key: getattr(section, key) or study.get(key) for key in ("accelerate", "gpus", "nodes")
        }
        try:
            launch = plan_launch(recipe.launch, **options)
            if study:
                accumulation_steps(recipe, launch.world_size)
        except RecipeErrors as several:
            self.errors += several.errors
        except RecipeError as error:
            where = self.document.origin(self._launch_key(name))
            file, line = (error.file, error.line) if error.file else (where.file, where.line)
            self.errors.append(
                RecipeError(f"arm '{name}': {error.what}", *error.hints, file=file, line=line)
            )
        else:
            return launch
        return None

    def _launch_key(self, name: str) -> KeyPath:
        """Where the arm's launch is written: at the arm, or for all arms."""
        own = [key for key in ("accelerate", "gpus", "nodes") if self._of_arm(name).get(key)]
        shared = [key for key in ("accelerate", "gpus", "nodes") if self.document.values.get(key)]
        return ("arms", name, own[0]) if own else (shared[0],) if shared else ("arms", name)

    def _recipe(self, name: str, section: ArmSection, words: Sequence[str]) -> Recipe | None:
        if section.recipe is None:
            return None
        key = ("arms", name, "recipe")
        path = self.document.folder(key) / section.recipe
        if not path.is_file():
            self.errors.append(
                self.document.error(
                    key, f"arm '{name}': no such recipe: {shown_path(path)}", *_alike(path)
                )
            )
            return None
        plain: Recipe | None = None
        try:
            plain = load_recipe(path)
            return load_recipe(path, words)
        except RecipeError as error:
            self.errors += (
                error.errors
                if plain is None
                else [self._at_override(name, one) for one in error.errors]
            )
        return None

    def _at_override(self, name: str, error: RecipeError) -> RecipeError:
        """Place an error that an override of the study makes where the override is written."""
        lists = {
            ("arms", name, "overrides"): self._of_arm(name).get("overrides"),
            ("overrides",): self.document.values.get("overrides"),
        }
        for path, words in lists.items():
            for position, word in enumerate(words or []):
                key = word.removeprefix("--").partition("=")[0]
                if key in error.what or word in error.what:
                    return self.document.error(
                        (*path, position), f"arm '{name}': {error.what}", *error.hints
                    )
        return (
            error
            if error.file
            else self.document.error(("arms", name), f"arm '{name}': {error.what}", *error.hints)
        )

    def _of_arm(self, name: str) -> dict[str, Any]:
        value = self.document.values["arms"][name]
        return value if isinstance(value, dict) else {}

    def eval(self, position: int) -> EvalRecipe | None:
        """Return one of the study's eval recipes."""
        key = ("evals", position)
        path = self.document.folder(key) / self.document.values["evals"][position]
        if not path.is_file():
            self.errors.append(
                self.document.error(key, f"no such eval recipe: {shown_path(path)}", *_alike(path))
            )
            return None
        try:
            return load_eval(path)
        except RecipeError as error:
            self.errors += error.errors
        return None

    def check_words(self, arms: Sequence[Arm]) -> None:
        """Refuse words for the arms' recipes where no arm is trained."""
        if self.words and arms and not any(arm.trained for arm in arms):
            what = f"{self.words[0]} changes nothing: no arm of this study is trained here"
            self.errors.append(
                RecipeError(
                    what, "what was trained elsewhere is as its recipe says", file=COMMAND_LINE
                )
            )

    def published(self, path: Path | None) -> None:
        """Read the file of published numbers, for what is wrong in it."""
        try:
            if path is not None:
                load_published(path)
        except RecipeError as error:
            self.errors += error.errors

    def one_base(self, study: Study) -> list[RecipeError]:
        """Return an error where `include_base` does not mean one model."""
        models = {
            (arm.recipe.model.name_or_path, arm.recipe.model.revision)
            for arm in study.arms
            if arm.recipe and arm.trained
        }
        if not study.include_base or len(models) < 2:
            return []
        names = ", ".join(sorted(name for name, _ in models))
        what = (
            f"include_base: the arms have different base models ({names}), so there is no one base"
        )
        return [
            self.document.error(
                ("include_base",),
                what,
                "set include_base: false, or give each base a study of its own",
            )
        ]
