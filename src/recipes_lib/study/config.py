"""A study file: its keys, and the arms, evals and aims that they name. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from recipes_lib.analysis.aims import Aims, Design, Margin, TunedArm, is_named, metric_parts
from recipes_lib.analysis.differences import OF_RUN
from recipes_lib.config.documents import (
    COMMAND_LINE,
    SECTIONS,
    Document,
    KeyPath,
    did_you_mean,
    dotted,
    no_such_file,
    read,
    value_text,
)
from recipes_lib.config.launch import Launch, accumulation_steps, plan_launch
from recipes_lib.config.parsing import Section, parse
from recipes_lib.config.recipe import Recipe, load_recipe, recipe_keys
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import recipe_path
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

BASE_ARM = "base"
# What a study sets for every training itself, and where.
_SET_BY_STUDY = {
    "train.seed": "the seeds of a study stand under its own key: seeds: [1, 2]",
    "run.name": "a run of a study is named after the study, its arm and its seed",
}
_SET_BY_LAUNCH = ("launch.distributed_type", "launch.mixed_precision", "launch.world_size")
# Keys that decide which tokens a validation loss is a mean over, and how.
_OF_THE_LOSS = (
    *("train.max_length", "train.completion_only_loss", "train.assistant_only_loss"),
    *("train.packing", "train.eval_packing", "train.truncation_mode"),
    *("train.bf16", "train.fp16", "train.bf16_full_eval", "train.fp16_full_eval"),
)
# Added to the recipe's seed: a training that won by its validation loss is flattered, so no arm's.
_TUNING_SEED = 1000
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")
Value = bool | int | float | str
Grid = Annotated[list[Value], Field(min_length=2)]


class LaunchKeys(Section):
    """Keys that a study and each of its arms may have; an arm's own values win."""

    accelerate: str | None = None
    """A file in accelerate_configs/, without .yaml. Absent: the recipe's launch.accelerate."""
    gpus: int | None = Field(None, ge=1)
    """Processes per node. Absent: the recipe's launch.gpus, or the accelerate config's."""
    nodes: int | None = Field(None, ge=1)
    """Machines. Absent: the recipe's launch.nodes."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] | None = None
    """Values of train.seed, each a training of its own. Absent: the recipe's."""
    overrides: list[str] = []
    """`section.key=value` words, as after `recipes train RECIPE`."""
    tune: Annotated[dict[str, Grid], Field(max_length=1)] | None = None
    """One key and the values to try: each arm is trained with every value, and the one with the
    lowest validation loss is the arm, trained anew with its seeds. An arm's own grid takes the
    place of the study's; {} tunes nothing."""


class ArmSection(LaunchKeys):
    """One variant. A bare path is short for `{recipe: path}`."""

    recipe: str
    """The arm's recipe, relative to the study file."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str) else value


class StudyFile(LaunchKeys):
    """A study: a question, the arms that answer it, and how they are evaluated."""

    kind: ClassVar = "study"

    question: str = Field(min_length=1)
    """What the study is to answer, as one question. It heads the report."""
    factors: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Factor -> the keys it may change (`lora.r`, `quantization`, ...). Every other difference
    between arms is a confound."""
    arms: dict[str, ArmSection] = Field(min_length=1)
    """Name -> arm."""
    include_base: bool = True
    """Evaluate the arms' base model too, as the arm `base`; once, however many arms there are."""
    evals: list[str] = []
    """Eval recipes, relative to the study file."""
    primary: str | None = None
    """The metric of the question, for example win_rate, alpaca_eval/win_rate or lm_eval/gsm8k. Its
    comparisons are tested before everything else. Absent: the first eval's first metric."""
    margins: dict[str, float | str] = {}
    """Metric -> the difference that does not matter, in its unit or as '2 points'. Adds the
    verdicts 'not worse' and 'equivalent' within it."""
    baseline: str | None = None
    """The arm that no other may be worse than (`recipes study report --gate`), and that alpaca_eval
    compares the others with. Absent: base where it is evaluated, else the first arm."""
    reference: dict[str, dict[str, float]] = {}
    """Published numbers, arm -> metric -> value (a share is 0.41): shown, and never tested."""


def study_schema() -> dict[str, Any]:
    """Return the schema of a study file, where an arm is a path or a mapping."""
    schema = StudyFile.model_json_schema()
    arms = schema["properties"]["arms"]
    arms["additionalProperties"] = {"anyOf": [{"type": "string"}, arms["additionalProperties"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@dataclass(frozen=True)
class Arm:
    """One variant; where it is tuned, `candidates` are an arm for each value of the grid."""

    name: str
    recipe: Recipe
    launch: Launch
    seeds: tuple[int, ...]
    tuning: TunedArm | None = None
    candidates: tuple[Arm, ...] = ()

    def tuned(self, losses: Sequence[float | None]) -> Arm:
        """Return the arm with the first value of the lowest loss; None cannot win."""
        assert self.tuning is not None
        tuning, recipe = replace(self.tuning, losses=tuple(losses)), self.recipe
        if finite := [loss for loss in losses if loss is not None]:
            best = losses.index(min(finite))
            tuning = replace(tuning, chosen=tuning.values[best])
            recipe = self.candidates[best].recipe
        return replace(self, recipe=recipe, tuning=tuning)

    @property
    def own_seed(self) -> int:
        """The seed that the recipe names."""
        return int(self.recipe.train.get("seed", 42))

    def resolved(self) -> dict[str, Any]:
        """Return every resolved value by dotted key, without the run's name and notes."""
        flat = flatten(self.recipe.to_dict())
        values = {key: value for key, value in flat.items() if key not in OF_RUN}
        if self.tuning:
            values[f"tune.{self.tuning.key}"] = list(self.tuning.values)
        launch = self.launch
        return {
            **values,
            "train.seed": self.seeds[0] if len(self.seeds) == 1 else list(self.seeds),
            "launch.accelerate": launch.config.path.stem,
            "launch.gpus": launch.per_machine,
            "launch.nodes": launch.machines,
            "launch.distributed_type": launch.distributed_type,
            "launch.world_size": launch.world_size,
            "launch.mixed_precision": launch.config.mixed_precision,
        }


@dataclass(frozen=True)
class Study:
    """A study that passed its check; `words` are those of the command line."""

    document: Document
    file: StudyFile
    arms: tuple[Arm, ...]
    evals: tuple[EvalRecipe, ...]
    aims: Aims
    words: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Its file."""
        return self.document.path

    @property
    def name(self) -> str:
        """The stem of its file, and its folder under runs/."""
        return self.path.stem

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        first = BASE_ARM if self.file.include_base else self.arms[0].name
        return self.file.baseline or first

    @property
    def undeclared(self) -> list[str]:
        """The keys that differ between arms and that no factor declares."""
        design = Design("", "", self.file.factors)
        first, *others = [arm.resolved() for arm in self.arms]
        keys = dict.fromkeys(key for values in (first, *others) for key in values)
        differing = [key for key in keys if any(v.get(key) != first.get(key) for v in others)]
        return [key for key in differing if not design.factor_of(key)]


# ---- Reading ----


def study_file(word: str) -> Path | None:
    """Return the file of a study given by path or short name, or None."""
    path = recipe_path(word)
    if not path.is_file() and not path.is_dir():
        path = recipe_path(f"studies/{word}")
    return path if path.is_file() and read(path).kind == "study" else None


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Load and check a study, its recipes and its evals; all that is wrong is reported at once.

    `overrides` are `section.key=value` words for every recipe, and `key=value` for own keys.
    """
    words = [word for word in overrides if _key_of(word).partition(".")[0] in SECTIONS]
    document = read(study_file(str(path)) or path, [w for w in overrides if w not in words])
    file = parse(StudyFile, document)
    reader = _Reader(document, file, words)
    reader.check_names()
    arms = [reader.arm(name, section) for name, section in file.arms.items()]
    evals = reader.evals()
    models = {(arm.recipe.model.name_or_path, arm.recipe.model.revision) for arm in arms if arm}
    if file.include_base and len(models) > 1:
        what = "include_base: the arms have different base models"
        reader.wrong(("include_base",), what, "set include_base: false, or split the study")
    aims = reader.aims(evals)
    if reader.errors:
        raise RecipeErrors({str(error): error for error in reader.errors}.values())
    return Study(document, file, tuple(filter(None, arms)), tuple(evals), aims, tuple(overrides))


def _key_of(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


class _Reader:
    """Reads what a study names, collecting errors instead of stopping."""

    def __init__(self, document: Document, keys: StudyFile, words: Sequence[str]) -> None:
        self.document, self.keys, self.words = document, keys, words
        self.errors: list[RecipeError] = []

    def wrong(self, place: KeyPath, what: str, *hints: str) -> None:
        """Add an error at a key of the study."""
        self.errors.append(self.document.error(place, what, *hints))

    @contextmanager
    def reported(self, place: KeyPath, label: str = "") -> Iterator[None]:
        """Collect errors. One about an override of the study is reported at a key of the study."""
        try:
            yield
        except RecipeError as error:
            for part in error.errors:
                file, line, prefix = part.file, part.line, label
                typed = any(_key_of(word) in part.what for word in self.words)
                if file is None or (file == COMMAND_LINE and not typed):
                    origin = self.document.origin(place)
                    file, line, prefix = origin.file, origin.line, label or f"{dotted(place)}: "
                error = RecipeError(f"{prefix}{part.what}", *part.hints, file=file, line=line)
                self.errors.append(error)

    def file(self, place: KeyPath, name: str) -> Path:
        """Return the file that a key names."""
        path = Path(self.document.absolute(place, name))
        if not path.is_file():
            missing = no_such_file(path)
            raise self.document.error(place, f"{missing.what}: {missing.file}", *missing.hints)
        return path

    def check_names(self) -> None:
        """Check names of arms, and the arms and keys that other parts of the study name."""
        keys = self.keys
        arms = [*keys.arms, *([BASE_ARM] if keys.include_base else [])]
        for name in keys.arms:
            if name == BASE_ARM or not _ARM_NAME.match(name):
                what = "use up to 60 letters, digits and ._- ('base' is the base model's)"
                self.wrong(("arms", name), f"arm name {name!r}: {what}")
        named: list[tuple[KeyPath, str]] = [(("reference", name), name) for name in keys.reference]
        for place, name in (*named, (("baseline",), keys.baseline or arms[0])):
            if name not in arms:
                what, near = f"{place[0]}: there is no arm '{name}'", did_you_mean(name, arms)
                self.wrong(place, what, *near, f"arms: {', '.join(arms)}")
        for factor, known in keys.factors.items():
            for number, key in enumerate(known):
                if key not in recipe_keys() and key not in _SET_BY_LAUNCH:
                    what = f"factor '{factor}': there is no key '{key}'"
                    near = did_you_mean(key, recipe_keys())
                    self.wrong(("factors", factor, number), what, *near)

    def evals(self) -> list[EvalRecipe]:
        """Return the evals; two of one name would write the same files."""
        evals: list[EvalRecipe] = []
        for number, name in enumerate(self.keys.evals):
            place = ("evals", number)
            with self.reported(place):
                recipe = load_eval(self.file(place, name))
                if recipe.name in [other.name for other in evals]:
                    raise self.document.error(place, f"evals: '{recipe.name}' is listed twice")
                evals.append(recipe)
        return evals

    def arm(self, name: str, section: ArmSection) -> Arm | None:
        """Return an arm; None where its recipe or launch cannot be had."""
        keys, place = self.keys, ("arms", name)
        words = [*keys.overrides, *section.overrides, *self.words]
        shared = bool(keys.overrides and not section.overrides)
        overrides = ("overrides",) if shared else place
        for key in _SET_BY_STUDY.keys() & set(map(_key_of, words)):
            self.wrong(overrides, f"{key} cannot be overridden in a study", _SET_BY_STUDY[key])

        def value(key: str) -> Any:  # the command line wins over the arm, the arm over the study
            own, shared = getattr(section, key), getattr(keys, key)
            typed = self.document.origin((key,)).file == COMMAND_LINE
            return shared if own is None or (typed and shared is not None) else own

        arm = None
        with self.reported(overrides):
            recipe = load_recipe(self.file((*place, "recipe"), section.recipe), words)
            with self.reported(place, f"arm '{name}': "):
                launch = plan_launch(recipe.launch, *map(value, ("accelerate", "gpus", "nodes")))
                accumulation_steps(recipe, launch.world_size)
                seeds = value("seeds") or [recipe.train.get("seed", 42)]
                arm = Arm(name, recipe, launch, tuple(seeds))
                if len({*arm.seeds}) < len(arm.seeds):
                    where: KeyPath = ("seeds",) if section.seeds is None else (*place, "seeds")
                    self.wrong(where, f"a seed is listed twice: {', '.join(map(str, arm.seeds))}")
        grid = keys.tune if section.tune is None else section.tune
        if not arm or not grid:
            return arm
        return self.tuned(arm, grid, words, ("tune",) if section.tune is None else (*place, "tune"))

    def tuned(
        self, arm: Arm, grid: Mapping[str, list[Value]], words: Sequence[str], place: KeyPath
    ) -> Arm:
        """Return an arm with a candidate for each value of its grid."""
        ((key, values),) = grid.items()
        seed = arm.own_seed + _TUNING_SEED
        tunable = key.startswith(("train.", "lora.")) or key == "run.global_batch_size"
        factor = Design("", "", self.keys.factors).factor_of(key)
        wrong = {
            "cannot be tuned: keys of train and lora can": key in _SET_BY_STUDY or not tunable,
            "changes what the validation loss is a mean over": key in _OF_THE_LOSS,
            f"is what the factor '{factor}' varies": factor is not None,
            f"needs seed {seed}, which is one of arm '{arm.name}'": seed in arm.seeds,
            "is chosen by the validation loss: set data.split.validation and train.eval_strategy": (
                arm.recipe.train.get("eval_strategy", "no") == "no"
            ),
        }
        if what := next((what for what, is_wrong in wrong.items() if is_wrong), ""):
            self.wrong(place, f"tune: {key} {what}")
        candidates = []
        for value in values:
            with self.reported(place, f"arm '{arm.name}': "):
                recipe = load_recipe(arm.recipe.path, [*words, f"{key}={value_text(value)}"])
                accumulation_steps(recipe, arm.launch.world_size)
                label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.")
                candidates.append(Arm(f"{arm.name}--tune-{label}", recipe, arm.launch, (seed,)))
        tuning = TunedArm(key, tuple(values), seed=seed)
        return replace(arm, tuning=tuning, candidates=tuple(candidates))

    def aims(self, evals: Sequence[EvalRecipe]) -> Aims:
        """Return what is asked of the table."""
        keys, metrics = self.keys, [name for recipe in evals for name in known_metrics(recipe)]
        hint = f"metrics: {', '.join(metrics) or 'none'}"

        def named(word: str) -> list[str]:
            return [name for recipe in evals if (name := full_name(recipe, word))]

        primary, margins = metrics[0] if metrics else None, {}
        if keys.primary:
            matches = named(keys.primary)
            primary = matches[0] if matches else None
            if len(matches) != 1:
                why = "several evals measure" if matches else "no eval of this study measures"
                self.wrong(("primary",), f"primary: {why} '{keys.primary}'", hint)
        for word, value in keys.margins.items():
            matches, margin = named(word), Margin.read(value)
            if margin is None:
                why = f"must be a number above 0, or one like '2 points', got {value!r}"
            elif not matches:
                why = "no eval of this study measures it"
            else:
                margins[word] = margin
                why = next(filter(None, map(margin.fits, matches)), "")
            if why:
                self.wrong(("margins", word), f"margins: {word}: {why}", hint)
        return Aims(primary, margins)


def known_metrics(recipe: EvalRecipe) -> list[str]:
    """Return the metrics of an eval by the names that a study may use, in its table's order."""
    metrics = SUITES[recipe.suite.name].metrics or recipe.suite.tasks or ()
    return [f"{recipe.name}/{metric}" for metric in metrics]


def full_name(recipe: EvalRecipe, word: str) -> str | None:
    """Return what a word means in an eval; None where it measures no such thing.

    lm_eval's tasks are known and their metrics are not; a group's tasks begin as the group does.
    """
    name = next((name for name in known_metrics(recipe) if is_named(word, name)), None)
    if name or recipe.suite.name != "lm_eval":
        return name
    tasks = [task.rstrip("*_") for task in recipe.suite.tasks or ()]
    parts = metric_parts(word)
    if any(part == task or part.startswith(f"{task}_") for part in parts for task in tasks):
        return word if is_named(recipe.name, word) else f"{recipe.name}/{word}"
    return None
