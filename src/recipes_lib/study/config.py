"""A study file: its keys, its arms with their recipes resolved, the declared factors, seeds and
evals. Needs no torch.

`load_study` is the only way in. What is wrong with a study, and with every recipe and eval it
names, is reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from recipes_lib.analysis.aims import Aims, Design, Margin, TunedArm, is_named, metric_parts
from recipes_lib.analysis.differences import OF_RUN
from recipes_lib.config.batch import accumulation_steps
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
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.parsing import Section, parse
from recipes_lib.config.recipe import Recipe, load_recipe, recipe_keys
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import recipe_path
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

BASE_ARM = "base"
# What a study gives to every training itself.
_GIVEN = {
    "train.seed": "the seeds of a study stand under its own key: seeds: [1, 2]",
    "run.name": "a run of a study is named after the study, its arm and its seed",
}
_MADE_BY_LAUNCH = ("launch.distributed_type", "launch.mixed_precision", "launch.world_size")
_BATCH = "run.global_batch_size"
# Keys that decide which tokens a validation loss is a mean over, and how.
_OF_THE_LOSS = (
    *("train.max_length", "train.completion_only_loss", "train.assistant_only_loss"),
    *("train.packing", "train.eval_packing", "train.truncation_mode"),
    *("train.bf16", "train.fp16", "train.bf16_full_eval", "train.fp16_full_eval"),
)
# A tuning is trained with a seed of its own: a training that won by its validation loss is
# flattered, and the same one with an arm's seed would be that training again.
_TUNING_SEED = 1000  # more than the recipe's
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")
Value = bool | int | float | str
Read = TypeVar("Read", Recipe, EvalRecipe)


class LaunchKeys(Section):
    """How arms are launched; the study's values are the defaults of its arms."""

    accelerate: str | None = None
    """Name of a file in accelerate_configs/, without .yaml. Absent: the recipe's
    launch.accelerate."""
    gpus: int | None = Field(None, ge=1)
    """Processes per node. Absent: the recipe's launch.gpus, else the accelerate config's."""
    nodes: int | None = Field(None, ge=1)
    """Machines. Absent: the recipe's launch.nodes."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] | None = None
    """Values of train.seed; each is a training of its own, and the variance between them enters the
    intervals. Absent: the recipe's."""
    overrides: list[str] = []
    """`section.key=value` words, as after `recipes train RECIPE`."""
    tune: dict[str, list[Value]] | None = None
    """One key and the values to try: each arm is trained with every value, and the one with the
    lowest validation loss is the arm, trained anew with its seeds. An arm's own grid takes the
    place of the study's; {} tunes nothing."""


class ArmSection(LaunchKeys):
    """One variant. A bare path is short for `{recipe: path}`."""

    recipe: str
    """The arm's recipe, relative to the study file."""


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
    pairs: Literal["baseline", "all"] = "baseline"
    """alpaca_eval: whom the answers are compared with head to head: each arm with the baseline, or
    with every other arm (the judge is asked as often as there are pairs)."""
    margins: dict[str, float | str] = {}
    """Metric -> the difference that does not matter, in its unit or as '2 points'. Adds the
    verdicts 'not worse' and 'equivalent' within it."""
    baseline: str | None = None
    """The arm that no other may be worse than (`recipes study report --gate`), and that alpaca_eval
    compares the others with. Absent: base where it is evaluated, else the first arm."""
    test_subtasks: bool = False
    """Test the tasks of an lm-eval group (mmlu) too. They are shown in any case, and their mean is
    tested."""
    reference: dict[str, dict[str, float]] = {}
    """Published numbers, arm -> metric -> value in the metric's unit (a share is 0.41). Shown
    beside ours and never tested."""


def study_schema() -> dict[str, Any]:
    """Return the schema of a study file; an arm is a path or a mapping."""
    schema = StudyFile.model_json_schema()
    arm = schema["properties"]["arms"]["additionalProperties"]
    schema["properties"]["arms"]["additionalProperties"] = {"anyOf": [{"type": "string"}, arm]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@dataclass(frozen=True)
class Arm:
    """One variant.

    Args:
        recipe: with the overrides applied, and the chosen value of a tuned arm once there is one.
        launch: as it will be.
        tuning: the grid that a key is chosen from; its `chosen` is None until all of it is trained.
        candidates: an arm for each value of the grid, trained once.
    """

    name: str
    recipe: Recipe
    launch: Launch
    seeds: tuple[int, ...]
    tuning: TunedArm | None = None
    candidates: tuple[Arm, ...] = ()

    def tuned(self, chosen: Value, losses: Sequence[float | None]) -> Arm:
        """Return the arm with the value of its grid that was chosen."""
        assert self.tuning is not None
        best = self.candidates[self.tuning.values.index(chosen)]
        tuning = replace(self.tuning, chosen=chosen, losses=tuple(losses))
        return replace(self, recipe=best.recipe, tuning=tuning)

    @property
    def own_seed(self) -> int:
        """The seed that the recipe names."""
        return int(self.recipe.train.get("seed", 42))

    def resolved(self) -> dict[str, Any]:
        """Return every resolved value by dotted key, the launch as it will be among them.

        The run's name and notes are left out; `train.seed` is a list where the arm has several, and
        `tune.KEY` is the grid of a tuned key.
        """
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

    def factor_of(self, key: str) -> str | None:
        """Return the factor that may change a key; None where a difference is a confound."""
        return Design("", "", self.file.factors).factor_of(key)

    def differing(self) -> list[str]:
        """Return the dotted keys whose values differ between arms."""
        resolved = [arm.resolved() for arm in self.arms]
        keys = dict.fromkeys(key for values in resolved for key in values)
        return [key for key in keys if any(v.get(key) != resolved[0].get(key) for v in resolved)]


# ---- Reading ----


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Load and check a study, its arms' recipes and its evals (stage 1: no torch).

    Args:
        path: the study file, or its short name in recipes/studies/.
        overrides: words from the command line: `section.key=value` for every arm's recipe, or
            `key=value` for the study's own keys (`seeds=[1,2]`, `gpus=2`).

    Raises:
        RecipeErrors: everything that is wrong, each at its file and line.
    """
    words = [word for word in overrides if _key_of(word).partition(".")[0] in SECTIONS]
    own = [word for word in overrides if word not in words]
    document = read(study_file(str(path)) or path, own)
    arms: Any = document.values.get("arms") if isinstance(document.values, dict) else None
    for name, arm in list(arms.items()) if isinstance(arms, dict) else ():
        if isinstance(arm, str):  # short for {recipe: path}
            arms[name] = {"recipe": arm}
            document.origins["arms", name, "recipe"] = document.origin(("arms", name))
    file = parse(StudyFile, document, _rules)
    reader = _Reader(document, file, words)
    study = reader.study(tuple(overrides))
    if reader.errors:
        raise RecipeErrors({str(error): error for error in reader.errors}.values())
    return study


def study_file(word: str) -> Path | None:
    """Return the file of a study given by path or short name; None where the word is no study."""
    path = recipe_path(word)
    if not path.is_file() and not path.is_dir():
        path = recipe_path(f"studies/{word}")
    return path if path.is_file() and read(path).kind == "study" else None


def _key_of(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


# ---- Rules between the study's own keys ----


def _rules(study: StudyFile, document: Document) -> Iterator[RecipeError]:
    arms = [*study.arms, *([BASE_ARM] if study.include_base else [])]
    if study.baseline is not None and study.baseline not in arms:
        near = did_you_mean(study.baseline, arms)
        what = f"baseline: there is no arm '{study.baseline}'"
        yield document.error("baseline", what, *near, f"arms: {', '.join(arms)}")
    for name in study.reference:
        if name not in (*study.arms, BASE_ARM):
            near = did_you_mean(name, study.arms)
            yield document.error(("reference", name), f"reference: no arm '{name}'", *near)
    for factor, keys in study.factors.items():
        for position, key in enumerate(keys):
            place = ("factors", factor, position)
            yield from _no_key(document, place, f"factor '{factor}'", key)
    sections: dict[KeyPath, LaunchKeys] = {(): study}
    for name, arm in study.arms.items():
        sections["arms", name] = arm
        if name == BASE_ARM or not _ARM_NAME.match(name):
            what = f"arm name {name!r}: 'base' is the base model's, others start with a letter"
            hint = "use up to 60 letters, digits, '.', '_' or '-'"
            yield document.error(("arms", name), what, hint)
    for path, section in sections.items():
        for number, word in enumerate(section.overrides):
            if _key_of(word) in _GIVEN:
                what = f"{_key_of(word)} cannot be overridden in a study"
                hint = _GIVEN[_key_of(word)]
                yield document.error((*path, "overrides", number), what, hint)
        yield from _wrong_grid(document, study, (*path, "tune"), section.tune or {})


def _wrong_grid(
    document: Document, study: StudyFile, path: KeyPath, grid: Mapping[str, list[Value]]
) -> Iterator[RecipeError]:
    """A grid: one key that validation losses can be compared on, two values or more."""
    where = dotted(path)
    if len(grid) > 1:
        hint = "several grids at once are arms of the study"
        yield document.error(path, f"{where} names {len(grid)} keys; tune one", hint)
    for key, values in grid.items():
        place = (*path, key)
        factor = Design("", "", study.factors).factor_of(key)
        if key in _GIVEN or not (key.startswith(("train.", "lora.")) or key == _BATCH):
            hint = f"keys of train and lora can, and {_BATCH}"
            yield document.error(place, f"{where}: {key} cannot be tuned", hint)
        elif key in _OF_THE_LOSS:
            what = f"{where}: {key} changes what the validation loss is a mean over"
            yield document.error(place, what, "compare arms with other values by an eval")
        elif len(set(values)) < max(len(values), 2):
            hint = f"for example {key}: [1.0e-4, 2.0e-4, 4.0e-4]"
            yield document.error(place, f"{where}: {key} needs two different values or more", hint)
        elif factor:
            what = f"{where}: {key} is what the factor '{factor}' varies"
            yield document.error(place, what, "vary it between arms, or tune it in each arm")
        else:
            yield from _no_key(document, place, where, key)


def _no_key(document: Document, path: KeyPath, place: str, key: str) -> Iterator[RecipeError]:
    """A dotted key, or a section, that cannot be written in a recipe."""
    if key not in recipe_keys() and key not in _MADE_BY_LAUNCH:
        near = did_you_mean(key, recipe_keys())
        yield document.error(path, f"{place}: there is no key '{key}'", *near)


# ---- The files that a study names ----


class _Reader:
    """Reads what a study names, collecting errors instead of stopping."""

    def __init__(self, document: Document, keys: StudyFile, words: Sequence[str]) -> None:
        self.document, self.keys, self.words = document, keys, words
        self.errors: list[RecipeError] = []

    def study(self, words: tuple[str, ...]) -> Study:
        """Return the study; a base that is not one model, and evals whose results would be one
        file, are errors.
        """
        keys = self.keys
        arms = [self.arm(name, section) for name, section in keys.arms.items()]
        places = [(("evals", number), place) for number, place in enumerate(keys.evals)]
        evals = list(filter(None, (self.file(key, place, load_eval) for key, place in places)))
        there = tuple(arm for arm in arms if arm)
        models = {(arm.recipe.model.name_or_path, arm.recipe.model.revision) for arm in there}
        if keys.include_base and len(models) > 1:
            bases = ", ".join(sorted(name for name, _ in models))
            what = f"include_base: the arms have different base models ({bases})"
            hint = "set include_base: false, or give each base a study of its own"
            self.wrong(("include_base",), what, hint)
        names = [recipe.name for recipe in evals]
        for name in {name for name in names if names.count(name) > 1}:
            self.wrong(("evals",), f"evals: '{name}' stands there twice", "rename or remove it")
        return Study(self.document, keys, there, tuple(evals), self.aims(evals), words)

    def wrong(self, path: KeyPath, what: str, *hints: str) -> None:
        """Add an error at a key of the study."""
        self.errors.append(self.document.error(path, what, *hints))

    def file(self, key: KeyPath, name: str, load: Callable[[Path], Read]) -> Read | None:
        """Return the recipe or eval that a key names; None where it cannot be used."""
        place = Path(self.document.absolute(key, name))
        if not place.is_file():
            missing = no_such_file(place)
            self.wrong(key, f"{missing.what}: {missing.file}", *missing.hints)
            return None
        try:
            return load(place)
        except RecipeError as error:
            self.errors += [self._where_written(key, part) for part in error.errors]
        return None

    def _where_written(self, key: KeyPath, error: RecipeError) -> RecipeError:
        """Return an error about an override at the study's line that has the override."""
        places: list[KeyPath] = [(*key[:2], "overrides"), ("overrides",)]
        place = next((path for path in places if path in self.document.origins), None)
        typed = any(_key_of(word) in error.what for word in self.words)
        if error.file not in (None, COMMAND_LINE) or place is None or typed:
            return error
        return self.document.error(place, f"{dotted(key[:2])}: {error.what}", *error.hints)

    def arm(self, name: str, section: ArmSection) -> Arm | None:
        """Return an arm; None where its recipe or launch cannot be had."""
        keys, place = self.keys, ("arms", name)
        words = [*keys.overrides, *section.overrides, *self.words]
        for key in {*map(_key_of, self.words)} & _GIVEN.keys():
            what = f"{key} cannot be overridden in a study"
            self.errors.append(RecipeError(what, _GIVEN[key], file=COMMAND_LINE))
        written: KeyPath = (*place, "recipe")
        recipe = self.file(written, section.recipe, lambda file: load_recipe(file, words))
        if recipe is None:
            return None
        try:
            flags = {key: self._value(section, key) for key in ("accelerate", "gpus", "nodes")}
            launch = plan_launch(recipe.launch, **flags)
            accumulation_steps(recipe, launch.world_size)
        except RecipeError as error:
            for part in error.errors:
                origin = self.document.origin(place)
                file, line = (part.file, part.line) if part.file else (origin.file, origin.line)
                what = f"arm '{name}': {part.what}"
                self.errors.append(RecipeError(what, *part.hints, file=file, line=line))
            return None
        seed = int(recipe.train.get("seed", 42))
        seeds = tuple(dict.fromkeys(self._value(section, "seeds") or [seed]))
        arm = Arm(name, recipe, launch, seeds)
        grid = keys.tune if section.tune is None else section.tune
        return self._tuned(arm, grid, words) if grid else arm

    def _value(self, section: ArmSection, key: str) -> Any:
        """Return an arm's value of a key that the study has too; the command line wins."""
        own, shared = getattr(section, key), getattr(self.keys, key)
        typed = self.document.origin((key,)).file == COMMAND_LINE
        return shared if own is None or (typed and shared is not None) else own

    def _tuned(self, arm: Arm, grid: Mapping[str, list[Value]], words: Sequence[str]) -> Arm:
        """Return an arm with its grid, each value an arm of its own."""
        ((key, values),) = grid.items()
        own: KeyPath = ("arms", arm.name, "tune")
        place = own if own in self.document.origins else ("tune",)
        seed = arm.own_seed + _TUNING_SEED
        if seed in arm.seeds:
            what = f"arm '{arm.name}': seed {seed} is that of its tuning"
            self.wrong(place, what, "choose another seed")
        if arm.recipe.train.get("eval_strategy", "no") == "no":
            what = f"arm '{arm.name}': its tuning has no validation loss to choose by"
            self.wrong(place, what, "set data.split.validation and train.eval_strategy")
        candidates = []
        for value in values:
            try:
                given = [*words, f"{key}={value_text(value)}"]
                recipe = load_recipe(arm.recipe.path, given)
                accumulation_steps(recipe, arm.launch.world_size)
            except RecipeError as error:
                for part in error.errors:
                    self.wrong(place, f"arm '{arm.name}': {part.what}", *part.hints)
                continue
            label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.")
            candidates.append(Arm(f"{arm.name}--tune-{label}", recipe, arm.launch, (seed,)))
        tuning = TunedArm(key, tuple(values), seed=seed)
        return replace(arm, tuning=tuning, candidates=tuple(candidates))

    def aims(self, evals: Sequence[EvalRecipe]) -> Aims:
        """Return what is asked of the table."""
        keys, metrics = self.keys, [name for recipe in evals for name in known_metrics(recipe)]
        hint = f"metrics: {', '.join(metrics) or 'none'}"
        primary = metrics[0] if metrics else None
        if keys.primary:
            named = [name for recipe in evals if (name := full_name(recipe, keys.primary))]
            primary = named[0] if named else None
            if len(named) != 1:
                why = "several evals measure" if named else "no eval of this study measures"
                names = f"metrics: {', '.join(named)}" if named else hint
                self.wrong(("primary",), f"primary: {why} '{keys.primary}'", names)
        margins = {}
        for word, value in keys.margins.items():
            margin = Margin.read(value)
            named = [name for recipe in evals if (name := full_name(recipe, word))]
            if margin is None:
                why = f"must be a number above 0, or one like '2 points', got {value!r}"
            elif not named:
                why = "no eval of this study measures it"
            else:
                margins[word] = margin
                why = next(filter(None, map(margin.fits, named)), "")
            if why:
                self.wrong(("margins", word), f"margins: {word}: {why}", *([] if named else [hint]))
        return Aims(primary, keys.test_subtasks, margins)


# ---- Metrics by name ----


def known_metrics(recipe: EvalRecipe) -> list[str]:
    """Return the metrics of an eval by the names that a study may use, the first one of its table
    first.
    """
    metrics: Iterable[str] = SUITES[recipe.suite.name].metrics or recipe.suite.tasks or ()
    return [f"{recipe.name}/{metric}" for metric in metrics]


def full_name(recipe: EvalRecipe, word: str) -> str | None:
    """Return what a word means in an eval; None where it measures no such thing.

    Of lm_eval the tasks are known and their metrics are not, so a word must name the eval or a task
    (one of a group's begins as its group does).
    """
    name = next((name for name in known_metrics(recipe) if is_named(word, name)), None)
    if name or recipe.suite.name != "lm_eval":
        return name
    tasks = [task.rstrip("*_") for task in recipe.suite.tasks or ()]
    parts = metric_parts(word)
    if any(part == task or part.startswith(f"{task}_") for part in parts for task in tasks):
        return word if is_named(recipe.name, word) else f"{recipe.name}/{word}"
    return None
