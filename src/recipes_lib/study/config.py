"""A study file: its keys, and the arms, evals and aims that they name. Needs no torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from recipes_lib.analysis.aims import Aims, Design, Margin, TunedArm, is_named, metric_parts
from recipes_lib.analysis.differences import OF_RUN
from recipes_lib.config.documents import COMMAND_LINE, Document, KeyPath, did_you_mean, read
from recipes_lib.config.launch import AccelerateConfigName, Launch, plan_launch
from recipes_lib.config.parsing import Section, parse
from recipes_lib.config.recipe import Recipe, RecipeFile, check_launch, keys_of, load_recipe
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.evals.lm_eval_files import metrics_of_task
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

BASE_ARM = "base"
_SET_BY_STUDY = {"train.seed", "run.name"}
_SET_BY_LAUNCH = ("launch.distributed_type", "launch.mixed_precision", "launch.world_size")
# Keys that decide which tokens a validation loss is a mean over, and how.
_OF_THE_LOSS = re.compile(r"train\.(max_length|truncation_mode|\w+_only_loss|packing|(bf|fp)16)$")
# Added to the recipe's seed: a training that won by its validation loss is flattered, so no arm's.
_TUNING_SEED = 1000
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
Grid = Annotated[list[bool | int | float | str], Field(min_length=2)]


class LaunchKeys(Section):
    """Keys that a study and its arms may have; an arm's values take precedence."""

    accelerate: AccelerateConfigName | None = None
    """As launch.accelerate, which it replaces; a path is relative to the study file."""
    gpus: int | None = Field(None, ge=1)
    """Processes per node. Default: the recipe's launch.gpus, or the accelerate config's."""
    nodes: int | None = Field(None, ge=1)
    """Machines. Default: the recipe's launch.nodes."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] | None = None
    """Values of train.seed, one training each. Default: the recipe's."""
    overrides: list[str] = []
    """`section.key=value` arguments, as after `recipes train RECIPE`."""
    tune: Annotated[dict[str, Grid], Field(max_length=1)] | None = None
    """One key and the values to try: each arm is trained with every value, keeps the one with the
    lowest validation loss, and is trained again with its seeds. An arm's own grid replaces the
    study's; {} tunes nothing."""


class ArmSection(LaunchKeys):
    """One variant. A bare path is short for `{recipe: path}`."""

    recipe: str
    """The arm's recipe, relative to the study file."""


def _as_arm(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


AnyArm = Annotated[ArmSection, BeforeValidator(_as_arm, json_schema_input_type=str | ArmSection)]


class StudyFile(LaunchKeys):
    """A study: a question, the arms that answer it, and how they are evaluated."""

    kind: ClassVar = "study"

    question: str = Field(min_length=1)
    """The one question that the study answers; the title of the report."""
    factors: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Factor -> the keys it may change (`lora.r`, `quantization`, ...). Every other difference
    between arms is a confound."""
    arms: dict[ArmName, AnyArm] = Field(min_length=1)
    """Name -> arm."""
    include_base: bool = True
    """Also evaluate the arms' base model, as the arm `base`; once, however many arms there are."""
    evals: list[str] = Field(min_length=1)
    """Eval recipes, relative to the study file."""
    primary: str | None = None
    """The metric that answers the question: win_rate, alpaca_eval/win_rate, lm_eval/gsm8k, ... Its
    comparisons are tested before everything else. Default: the first eval's first metric."""
    margins: dict[str, float | str] = {}
    """Metric -> the largest difference that does not matter, in its unit or as '2 points'. Adds
    the verdicts 'not worse' and 'equivalent'."""
    baseline: str | None = None
    """The arm that no other may be worse than (`recipes study report --gate`), and that alpaca_eval
    compares the others with. Default: base if it is evaluated, else the first arm."""
    reference: dict[str, dict[str, float]] = {}
    """Published numbers, arm -> metric -> value (a share is 0.41): shown, never tested."""


@dataclass(frozen=True)
class Arm:
    """One variant; where it is tuned, `candidates` are an arm for each value of the grid."""

    name: str
    recipe: Recipe
    launch: Launch
    seeds: tuple[int, ...]
    tuning: TunedArm | None = None
    candidates: tuple[Arm, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """Return every resolved value by dotted key, without the run's name and notes."""
        values, launch = flatten(self.recipe.to_dict()), self.launch
        if self.tuning:
            values[f"tune.{self.tuning.key}"] = list(self.tuning.values)
        return {
            **{key: value for key, value in values.items() if key not in OF_RUN},
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

    name: str  # the stem of its file, and its folder under runs/
    document: Document
    file: StudyFile
    arms: tuple[Arm, ...]
    evals: tuple[EvalRecipe, ...]
    aims: Aims
    words: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        first = BASE_ARM if self.file.include_base else self.arms[0].name
        return self.file.baseline or first

    @property
    def design(self) -> Design:
        """What it declares, as far as conclusions depend on it."""
        return Design(
            name=self.name,
            question=self.file.question,
            factors=self.file.factors,
            values={arm.name: arm.resolved() for arm in self.arms},
            tuned={arm.name: arm.tuning for arm in self.arms if arm.tuning},
            reference=self.file.reference,
            command=shlex.join(["recipes", "study", "run", self.document.file, *self.words]),
            evals=tuple(shown_path(recipe.document.path) for recipe in self.evals),
        )


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
    words = [word for word in overrides if "." in _key_of(word)]
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
    known, name = tuple(filter(None, arms)), document.path.stem
    return Study(name, document, file, known, tuple(evals), aims, tuple(overrides))


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
        """Collect errors; one without a line of its own is reported at a key of the study."""
        try:
            yield
        except RecipeError as error:
            for part in error.errors:
                typed, shared = (
                    any(_key_of(word) in part.what for word in words)
                    for words in (self.words, self.keys.overrides)
                )
                if part.file == COMMAND_LINE and typed:
                    self.errors.append(part)
                elif part.file == COMMAND_LINE:  # the study's own override
                    self.wrong(("overrides",) if shared else place, part.what, *part.hints)
                elif part.line is None:
                    of = f"{part.file}: " * bool(part.file)
                    self.wrong(place, f"{label}{of}{part.what}", *part.hints)
                else:
                    words = (f"{label}{part.what}", *part.hints)
                    self.errors.append(RecipeError(*words, file=part.file, line=part.line))

    def check_names(self) -> None:
        """Check the arms and keys that other parts of the study name."""
        keys = self.keys
        arms = [*keys.arms, *([BASE_ARM] if keys.include_base else [])]
        if BASE_ARM in keys.arms:
            self.wrong(("arms", BASE_ARM), "'base' means the base model: rename the arm")
        named: list[tuple[KeyPath, str]] = [(("reference", name), name) for name in keys.reference]
        for place, name in (*named, (("baseline",), keys.baseline or arms[0])):
            if name not in arms:
                what, near = f"{place[0]}: there is no arm '{name}'", did_you_mean(name, arms)
                self.wrong(place, what, *near, f"arms: {', '.join(arms)}")
        known = keys_of(RecipeFile).keys() | {*_SET_BY_LAUNCH}
        for factor, own in keys.factors.items():
            for key in [key for key in own if key not in known]:
                what = f"factor '{factor}': there is no key '{key}'"
                self.wrong(("factors", factor), what, *did_you_mean(key, known))

    def evals(self) -> list[EvalRecipe]:
        """Return the evals; two of one name would write the same files."""
        evals: list[EvalRecipe] = []
        for number, name in enumerate(self.keys.evals):
            with self.reported(("evals", number)):
                recipe = load_eval(self.document.absolute(("evals", number), name))
                if recipe.name in [other.name for other in evals]:
                    raise RecipeError(f"evals: '{recipe.name}' is listed twice")
                evals.append(recipe)
        return evals

    def arm(self, name: str, section: ArmSection) -> Arm | None:
        """Return an arm; None where its recipe or launch cannot be had."""
        keys, place, arm = self.keys, ("arms", name), None
        words = [*keys.overrides, *section.overrides, *self.words]

        def value(key: str) -> Any:  # the command line wins over the arm, the arm over the study
            own, shared = getattr(section, key), getattr(keys, key)
            typed = self.document.origin((key,)).file == COMMAND_LINE
            return shared if own is None or (typed and shared is not None) else own

        with self.reported(place, f"arm '{name}': "):
            for key in _SET_BY_STUDY & set(map(_key_of, words)):
                what = f"{key} cannot be overridden in a study; for seeds write seeds: [1, 2]"
                raise RecipeError(what, file=COMMAND_LINE)
            recipe = load_recipe(self.document.absolute(place, section.recipe), words)
            launch = plan_launch(recipe.launch, *map(value, ("accelerate", "gpus", "nodes")))
            check_launch(recipe, launch)
            seeds = value("seeds") or [recipe.train.get("seed", 42)]
            arm = Arm(name, recipe, launch, tuple(dict.fromkeys(seeds)))
        grid = keys.tune if section.tune is None else section.tune
        return self.tuned(arm, grid, words) if arm and grid else arm

    def tuned(self, arm: Arm, grid: Mapping[str, list[Any]], words: Sequence[str]) -> Arm:
        """Return an arm with a candidate for each value of its grid."""
        ((key, values),) = grid.items()
        seed, own = arm.recipe.train.get("seed", 42) + _TUNING_SEED, ("arms", arm.name, "tune")
        place: KeyPath = own if own in self.document.origins else ("tune",)
        tunable = key.startswith(("train.", "lora.")) or key == "run.global_batch_size"
        if not tunable or key in _SET_BY_STUDY or _OF_THE_LOSS.match(key):
            what = "cannot be tuned: it is not in train or lora, or decides what the loss measures"
            self.wrong(place, f"tune: {key} {what}")
        if factor := Design("", "", self.keys.factors).factor_of(key):
            self.wrong(place, f"tune: {key} is what the factor '{factor}' varies")
        if arm.recipe.train.get("eval_strategy", "no") == "no" or seed in arm.seeds:
            what = f"a validation loss must choose (train.eval_strategy); seed {seed} is its own"
            self.wrong(place, f"tune: {what}")
        candidates = []
        for value in values:
            with self.reported(place, f"arm '{arm.name}': "):
                recipe = load_recipe(arm.recipe.path, [*words, f"{key}={json.dumps(value)}"])
                check_launch(recipe, arm.launch)
                label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.")
                candidates.append(Arm(f"{arm.name}--tune-{label}", recipe, arm.launch, (seed,)))
        tuning = TunedArm(key, tuple(values), seed=seed)
        return replace(arm, tuning=tuning, candidates=tuple(candidates))

    def aims(self, evals: Sequence[EvalRecipe]) -> Aims:
        """Return what is asked of the table."""
        keys, metrics = self.keys, [name for recipe in evals for name in known_metrics(recipe)]
        hint, margins = f"metrics: {', '.join(metrics)}", dict[str, Margin]()

        def named(word: str) -> list[str]:
            return [name for recipe in evals if (name := full_name(recipe, word))]

        primary = named(keys.primary) if keys.primary else metrics[:1]
        if keys.primary and len(primary) != 1:
            why = "several evals measure" if primary else "no eval of this study measures"
            self.wrong(("primary",), f"primary: {why} '{keys.primary}'", hint)
        elif keys.primary:
            self.refuse_absent_metric("primary", ("primary",), keys.primary, evals)
        for word, value in keys.margins.items():
            faults = ["must be a number above 0, or one like '2 points'"]
            if margin := Margin.read(value):
                margins[word] = margin
                faults = [*map(margin.fits, named(word))] or ["no eval of this study measures it"]
            for why in [*filter(None, faults)][:1]:
                self.wrong(("margins", word), f"margins: {word}: {why}", hint)
            self.refuse_absent_metric(f"margins: {word}", ("margins", word), word, evals)
        return Aims(next(iter(primary), None), margins)

    def refuse_absent_metric(
        self, key: str, place: KeyPath, word: str, evals: Sequence[EvalRecipe]
    ) -> None:
        """Refuse the name of a metric that no result will have, as far as the tasks' files tell."""
        reported: dict[str, None] = {}
        for recipe in evals:
            for task in recipe.suite.tasks or ():
                if task not in metric_parts(word):
                    continue
                metrics = metrics_of_task(task, recipe.data.include_path)
                if metrics is None or recipe.suite.options.get("predict_only"):
                    return  # only a run can tell
                if any(_means(word, recipe.name, task, metric) for metric in metrics):
                    return
                reported |= dict.fromkeys(f"{task}/{metric}" for metric in metrics)
        if reported:
            hint = f"metrics: {'; '.join(reported)}"
            self.wrong(place, f"{key}: lm-eval reports no such metric: '{word}'", hint)


def _means(word: str, recipe: str, task: str, metric: str) -> bool:
    """Return whether a word means a metric of a task; `acc,*` is acc with any filter."""
    any_filter = metric.removesuffix("*")
    last = metric_parts(word)[-1]
    if any_filter != metric and last.startswith(any_filter):
        metric = last
    return is_named(word, f"{recipe}/{task}/{metric}")


def known_metrics(recipe: EvalRecipe) -> list[str]:
    """Return the metrics of an eval by the names that a study may use, in its table's order."""
    metrics = SUITES[recipe.suite.name].metrics or recipe.suite.tasks or ()
    return [f"{recipe.name}/{metric}" for metric in metrics]


def full_name(recipe: EvalRecipe, word: str) -> str | None:
    """Return what a word means in an eval; None where it measures no such thing.
    lm_eval's tasks are known and their metrics are not; a group's tasks begin as the group does.
    """
    if name := next((name for name in known_metrics(recipe) if is_named(word, name)), None):
        return name
    tasks = [task.rstrip("*_") for task in recipe.suite.tasks or ()]  # none but of lm_eval
    if any(f"{part}_".startswith(f"{task}_") for part in metric_parts(word) for task in tasks):
        return word if is_named(recipe.name, word) else f"{recipe.name}/{word}"
    return None
