"""A study file: its keys, and the arms, evals and aims that they name. Needs no torch."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from recipes_lib.analysis.aims import Aims, Design, Margin, TunedArm, is_named, metric_parts
from recipes_lib.analysis.differences import OF_RUN
from recipes_lib.analysis.looks import Look, looks_after
from recipes_lib.config.documents import COMMAND_LINE, Document, KeyPath, did_you_mean, read
from recipes_lib.config.launch import AccelerateConfigName, Launch, plan_launch
from recipes_lib.config.parsing import Section, parse
from recipes_lib.config.recipe import Recipe, all_keys, check_launch, load_recipe
from recipes_lib.core.errors import RecipeError, RecipeErrors, RecipesError
from recipes_lib.core.project import project_root, recipe_path, shown_path
from recipes_lib.evals.lm_eval_files import metrics_of_task
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

BASE_ARM = "base"
# Keys of a recipe that the study sets for each of its trainings.
_SET_BY_STUDY = {"train.seed", "run.name"}
# Keys that follow from a launch, which a factor may name beside a recipe's own.
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
    looks: list[int] | None = None
    """Numbers of seeds after which the study is tested, [3, 5]: it trains on only if a pair of arms
    is undecided. Rising, the first at least 2, the last all seeds. Default: one test of all."""
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
    candidates: tuple["Arm", ...] = ()

    def resolved(self) -> dict[str, Any]:
        """Return every resolved value by dotted key, without the run's name and notes."""
        values = flatten(self.recipe.to_dict())
        if self.tuning:
            values[f"tune.{self.tuning.key}"] = list(self.tuning.values)
        values = {key: value for key, value in values.items() if key not in OF_RUN}
        launch = self.launch
        return values | {
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
    """A study that passed its check."""

    name: str  # the stem of its file, and its folder under runs/
    document: Document
    file: StudyFile
    arms: tuple[Arm, ...]
    evals: tuple[EvalRecipe, ...]
    aims: Aims
    overrides: tuple[str, ...]  # as typed on the command line

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        first = BASE_ARM if self.file.include_base else self.arms[0].name
        return self.file.baseline or first

    @property
    def looks(self) -> tuple[Look, ...]:
        """Its tests in their order; none of a study that is tested once."""
        if not self.file.looks:
            return ()
        return looks_after(self.file.looks, len(self.arms))

    def at(self, look: Look | None) -> "Study":
        """Return the study with the seeds that it has at a look."""
        if look is None:
            return self
        arms = [replace(arm, seeds=arm.seeds[: look.seeds]) for arm in self.arms]
        return replace(self, arms=tuple(arms), aims=replace(self.aims, look=look))

    @property
    def design(self) -> Design:
        """What it declares, as far as conclusions depend on it."""
        command = ["recipes", "study", "run", self.document.file, *self.overrides]
        return Design(
            name=self.name,
            question=self.file.question,
            factors=self.file.factors,
            values={arm.name: arm.resolved() for arm in self.arms},
            tuned={arm.name: arm.tuning for arm in self.arms if arm.tuning},
            reference=self.file.reference,
            command=shlex.join(command),
            evals=tuple(shown_path(recipe.document.path) for recipe in self.evals),
        )


def study_file(word: str) -> Path | None:
    """Return the file of a study given by path or short name, or None."""
    path = recipe_path(word)
    if not path.is_file() and not path.is_dir():
        path = recipe_path(f"studies/{word}")
    if path.is_file() and read(path).kind == "study":
        return path
    return None


def _no_such_study(file: Path) -> RecipeError:
    """Return the error for a study that does not exist, with the names of those that do."""
    names: dict[str, None] = {}  # each once: the working directory may be the checkout
    for root in (Path("recipes"), project_root() / "recipes"):
        for path in sorted(root.rglob("*.yaml")):
            with suppress(RecipesError):
                if read(path).kind == "study":
                    name = path.relative_to(root).with_suffix("").as_posix()
                    names[name.removeprefix("studies/")] = None
    hints = [*did_you_mean(file.stem, names), f"studies: {', '.join(names)}"]
    return RecipeError("no such file or study", *hints, file=shown_path(file))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Load and check a study, its recipes and its evals; all errors are reported at once.
    `overrides` are `section.key=value` for every recipe, and `key=value` for the study's keys.
    """
    of_recipes = [word for word in overrides if "." in _key_of(word)]
    of_study = [word for word in overrides if word not in of_recipes]
    file = study_file(str(path)) or recipe_path(path)
    if not file.exists():
        raise _no_such_study(file)
    document = read(file, of_study)
    reader = _Reader(document, parse(StudyFile, document), of_recipes)
    reader.check_names()
    arms = reader.arms()
    reader.check_looks(arms)
    evals = reader.evals()
    aims = reader.aims(evals)
    if reader.errors:
        raise RecipeErrors({str(error): error for error in reader.errors}.values())
    study = Study(
        name=document.path.stem,
        document=document,
        file=reader.keys,
        arms=tuple(arms),
        evals=tuple(evals),
        aims=aims,
        overrides=tuple(overrides),
    )
    return replace(study, aims=replace(aims, baseline=study.baseline))


def _key_of(override: str) -> str:
    return override.removeprefix("--").partition("=")[0]


class _Reader:
    """Reads what a study names, collecting errors instead of stopping."""

    def __init__(self, document: Document, keys: StudyFile, overrides: list[str]) -> None:
        self.document = document
        self.keys = keys
        self.overrides = overrides
        self.errors: list[RecipeError] = []

    def add_error(self, key: KeyPath, what: str, *hints: str) -> None:
        """Add an error at a key of the study."""
        self.errors.append(self.document.error(key, what, *hints))

    @contextmanager
    def collecting(self, key: KeyPath, label: str = "") -> Iterator[None]:
        """Collect errors; one without a line is reported at a key of the study."""
        try:
            yield
        except RecipeError as error:
            for part in error.errors:
                what = f"{label}{part.what}"
                if part.file == COMMAND_LINE:
                    if any(_key_of(word) in part.what for word in self.overrides):
                        self.errors.append(part)
                        continue
                    # an override that the study's file gives to all arms, or to one
                    is_shared = any(_key_of(word) in part.what for word in self.keys.overrides)
                    self.add_error(("overrides",) if is_shared else key, part.what, *part.hints)
                elif part.line is not None:
                    located = RecipeError(what, *part.hints, file=part.file, line=part.line)
                    self.errors.append(located)
                else:
                    if part.file:
                        what = f"{label}{part.file}: {part.what}"
                    self.add_error(key, what, *part.hints)

    def check_names(self) -> None:
        """Check the arms and keys that other parts of the study name."""
        arms = list(self.keys.arms)
        if BASE_ARM in arms:
            self.add_error(("arms", BASE_ARM), "'base' means the base model: rename the arm")
        if self.keys.include_base:
            arms.append(BASE_ARM)
        mentions: dict[KeyPath, str] = {("reference", arm): arm for arm in self.keys.reference}
        mentions["baseline",] = self.keys.baseline or arms[0]
        for key, arm in mentions.items():
            if arm not in arms:
                what = f"{key[0]}: there is no arm '{arm}'"
                self.add_error(key, what, *did_you_mean(arm, arms), f"arms: {', '.join(arms)}")
        recipe_keys = all_keys().keys() | set(_SET_BY_LAUNCH)
        for factor, may_change in self.keys.factors.items():
            for key_name in may_change:
                if key_name not in recipe_keys:
                    what = f"factor '{factor}': there is no key '{key_name}'"
                    hints = did_you_mean(key_name, recipe_keys)
                    self.add_error(("factors", factor), what, *hints)

    def evals(self) -> list[EvalRecipe]:
        """Return the evals; two of one name would write the same files."""
        evals: dict[str, EvalRecipe] = {}
        for number, name in enumerate(self.keys.evals):
            with self.collecting(("evals", number)):
                recipe = load_eval(self.document.absolute(("evals", number), name))
                if recipe.name in evals:
                    raise RecipeError(f"evals: '{recipe.name}' is listed twice")
                evals[recipe.name] = recipe
        return list(evals.values())

    def arms(self) -> list[Arm]:
        """Return the arms whose recipes and launches are valid."""
        arms: list[Arm] = []
        for name, section in self.keys.arms.items():
            with self.collecting(("arms", name), f"arm '{name}': "):
                arms.append(self.arm(name, section))
        models = {(arm.recipe.model.name_or_path, arm.recipe.model.revision) for arm in arms}
        if self.keys.include_base and len(models) > 1:
            what = "include_base: the arms have different base models"
            hint = "set include_base: false, or split the study"
            self.add_error(("include_base",), what, hint)
        return arms

    def check_looks(self, arms: Sequence[Arm]) -> None:
        """Check the numbers of seeds after which the study is tested."""
        looks = self.keys.looks
        if looks is None or not arms:
            return
        key: KeyPath = ("looks",)
        hint = "as looks: [3, 5] with five seeds; without looks a study is tested once"
        if len(looks) < 2 or looks != sorted(set(looks)):
            self.add_error(key, "looks: must be two or more rising numbers of seeds", hint)
        elif looks[0] < 2:
            what = "looks: the first is after at least 2 seeds: one says nothing about a recipe"
            self.add_error(key, what, hint)
        for arm in arms:
            if arm.seeds != arms[0].seeds:
                what = f"looks: {arm.name} has other seeds than {arms[0].name}, or another order"
                self.add_error(key, what, "give all arms one list: seeds of the study")
        declared = len(arms[0].seeds)
        if looks and looks[-1] != declared:
            what = f"looks: the last is after {looks[-1]} seeds, and {declared} are declared"
            self.add_error(key, what, "the last look has all seeds")

    def arm(self, name: str, section: ArmSection) -> Arm:
        """Return an arm, with the candidates of its grid."""

        def value(key: str) -> Any:
            """Return the command line's value, else the arm's, else the study's."""
            of_study = getattr(self.keys, key)
            of_arm = getattr(section, key)
            is_typed = self.document.origin((key,)).file == COMMAND_LINE
            if of_arm is None or (is_typed and of_study is not None):
                return of_study
            return of_arm

        # the last of one key wins
        overrides = self.keys.overrides + section.overrides + self.overrides
        for key in map(_key_of, overrides):
            if key in _SET_BY_STUDY:
                what = f"{key} cannot be overridden in a study; for seeds write seeds: [1, 2]"
                raise RecipeError(what, file=COMMAND_LINE)
        recipe = load_recipe(self.document.absolute(("arms", name), section.recipe), overrides)
        launch = plan_launch(recipe.launch, value("accelerate"), value("gpus"), value("nodes"))
        check_launch(recipe, launch)
        seeds = value("seeds") or [recipe.train.get("seed", 42)]
        arm = Arm(name, recipe, launch, seeds=tuple(dict.fromkeys(seeds)))
        grid = self.keys.tune if section.tune is None else section.tune
        return self.tuned(arm, grid, overrides) if grid else arm

    def tuned(self, arm: Arm, grid: Mapping[str, list[Any]], overrides: Sequence[str]) -> Arm:
        """Return an arm with a candidate for each value of its grid."""
        ((key, values),) = grid.items()
        seed = arm.recipe.train.get("seed", 42) + _TUNING_SEED
        key_path: KeyPath = ("arms", arm.name, "tune")
        if key_path not in self.document.origins:
            key_path = ("tune",)
        tunable = key.startswith(("train.", "lora.")) or key == "run.global_batch_size"
        if not tunable or key in _SET_BY_STUDY or _OF_THE_LOSS.match(key):
            what = "cannot be tuned: it is not in train or lora, or decides what the loss measures"
            self.add_error(key_path, f"tune: {key} {what}")
        factor = Design("", "", factors=self.keys.factors).factor_of(key)
        if factor is not None:
            self.add_error(key_path, f"tune: {key} is what the factor '{factor}' varies")
        if arm.recipe.train.get("eval_strategy", "no") == "no" or seed in arm.seeds:
            what = f"a validation loss must choose (train.eval_strategy); seed {seed} is its own"
            self.add_error(key_path, f"tune: {what}")
        candidates = []
        for value in values:
            with self.collecting(key_path, f"arm '{arm.name}': "):
                override = f"{key}={json.dumps(value)}"
                recipe = load_recipe(arm.recipe.path, list(overrides) + [override])
                check_launch(recipe, arm.launch)
                label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.")
                name = f"{arm.name}--tune-{label}"
                candidates.append(Arm(name, recipe, arm.launch, seeds=(seed,)))
        tuning = TunedArm(key, tuple(values), seed=seed)
        return replace(arm, tuning=tuning, candidates=tuple(candidates))

    def aims(self, evals: Sequence[EvalRecipe]) -> Aims:
        """Return the primary metric and the margins."""
        metrics: list[str] = []
        for recipe in evals:
            metrics += known_metrics(recipe)
        hint = f"metrics: {', '.join(metrics)}"
        meant = metrics[:1]
        if self.keys.primary:
            meant = _metrics_named(self.keys.primary, evals)
            if len(meant) == 1:
                self.refuse_absent_metric(("primary",), self.keys.primary, evals)
            else:
                why = "several evals measure" if meant else "no eval of this study measures"
                self.add_error(("primary",), f"primary: {why} '{self.keys.primary}'", hint)
        margins: dict[str, Margin] = {}
        for word, value in self.keys.margins.items():
            margin = Margin.read(value)
            measured = _metrics_named(word, evals)
            if margin is None:
                fault = "must be a number above 0, or one like '2 points'"
            elif not measured:
                fault = "no eval of this study measures it"
            else:
                margins[word] = margin
                fault = ""
                for metric in measured:
                    fault = fault or margin.fits(metric)
            if fault:
                self.add_error(("margins", word), f"margins: {word}: {fault}", hint)
            self.refuse_absent_metric(("margins", word), word, evals)
        return Aims(primary=meant[0] if meant else None, margins=margins)

    def refuse_absent_metric(
        self, key: tuple[str, ...], word: str, evals: Sequence[EvalRecipe]
    ) -> None:
        """Refuse the name of a metric that no result will have, as far as the tasks' files tell."""
        reported: list[str] = []
        for recipe in evals:
            for task in recipe.suite.tasks or ():
                if task not in metric_parts(word):
                    continue
                metrics = metrics_of_task(task, recipe.data.include_path)
                if metrics is None or recipe.suite.options.get("predict_only"):
                    return  # only a run can tell
                if any(_means(word, recipe.name, task, metric) for metric in metrics):
                    return
                reported += [f"{task}/{metric}" for metric in metrics]
        if reported:
            what = f"{': '.join(key)}: lm-eval reports no such metric: '{word}'"
            self.add_error(key, what, f"metrics: {'; '.join(dict.fromkeys(reported))}")


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
    """Return the metric that a word means in an eval; None where it measures no such thing."""
    for metric in known_metrics(recipe):
        if is_named(word, metric):
            return metric
    # of lm_eval the tasks are known and their metrics are not; a group's tasks begin as it does
    tasks = [task.rstrip("*_") for task in recipe.suite.tasks or ()]
    for part in metric_parts(word):
        if any(f"{part}_".startswith(f"{task}_") for task in tasks):
            return word if is_named(recipe.name, word) else f"{recipe.name}/{word}"
    return None


def _metrics_named(word: str, evals: Sequence[EvalRecipe]) -> list[str]:
    return list(filter(None, [full_name(recipe, word) for recipe in evals]))
