"""A study file: its keys, its arms with their recipes resolved, the declared factors, seeds and
evals. Needs no torch.

`load_study` is the only way in. What is wrong with a study, and with every recipe and eval it
names, is reported at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from recipes_lib.analysis.aims import Aims, Design, Margin, is_named, metric_parts
from recipes_lib.analysis.differences import OF_RUN
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.documents import (
    COMMAND_LINE,
    SECTIONS,
    Document,
    KeyPath,
    Origin,
    did_you_mean,
    dotted,
    kind_of,
    read,
    value_text,
    wrong_kind,
)
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.parsing import Section, judge
from recipes_lib.config.preflight import check_upstream
from recipes_lib.config.recipe import Recipe, load_recipe, near_keys, recipe_keys
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import check_run_name, project_root, recipe_path, shown_path
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

BASE_ARM = "base"
_LAUNCH = ("accelerate", "gpus", "nodes")
_MADE_BY_LAUNCH = ("launch.distributed_type", "launch.mixed_precision", "launch.world_size")
_BATCH = "run.global_batch_size"
# What a study gives to every training itself.
_GIVEN = {
    "train.seed": (
        "the seeds of a study stand under its own key: seeds: [1, 2], on the command line"
        " 'seeds=[1, 2]'"
    ),
    "run.name": "a run of a study is named after the study, its arm and its seed",
}
# Keys of train and lora that decide which tokens a validation loss is a mean over, and how.
_OF_THE_LOSS = (
    "train.max_length",
    "train.completion_only_loss",
    "train.assistant_only_loss",
    "train.packing",
    "train.eval_packing",
    "train.truncation_mode",
    "train.bf16",
    "train.fp16",
    "train.bf16_full_eval",
    "train.fp16_full_eval",
)
# A tuning is trained with a seed of its own: a training that won by its validation loss is
# flattered, and the same one with an arm's seed would be that training again.
_TUNING_SEED = 1000  # more than the recipe's
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")


class LaunchKeys(Section):
    """How arms are launched; the study's values are the defaults of its arms."""

    accelerate: str | None = None
    """Name of a file in accelerate_configs/, without .yaml. Absent: the recipe's
    launch.accelerate."""
    gpus: int | None = Field(None, ge=1)
    """Processes per node. Absent: the recipe's launch.gpus, else the accelerate config's."""
    nodes: int | None = Field(None, ge=1)
    """Machines. Absent: the recipe's launch.nodes."""
    seeds: list[int] | None = None
    """Values of train.seed; each is a training of its own, and the variance between them enters the
    intervals. Absent: the recipe's."""
    overrides: list[str] = []
    """`section.key=value` words, as after `recipes train RECIPE`."""
    tune: dict[str, list[bool | int | float | str]] | None = None
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
    gone: ClassVar = {
        "published": "write the numbers under reference: {arm: {metric: value}}",
        "looks": "remove it: verdicts wait until everything declared is there",
    }
    question: str
    """What the study is to answer, as one question. It heads the report."""
    factors: dict[str, list[str]] = {}
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
class Tuning:
    """The grid of an arm: one key, the values tried, and for each an arm of its own that is
    trained once.

    `chosen` is None until all are trained; then `losses` holds the validation loss of each, None
    where the training diverged.
    """

    key: str
    values: tuple[bool | int | float | str, ...]
    candidates: tuple[Arm, ...] = field(repr=False)
    chosen: bool | int | float | str | None = None
    losses: tuple[float | None, ...] = ()

    @property
    def grid(self) -> str:
        """The values tried, in words."""
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Arm:
    """One variant. `recipe` has the overrides applied, and the chosen value of a tuned arm once
    there is one; `launch` is as it will be.
    """

    name: str
    recipe: Recipe
    overrides: tuple[str, ...]
    launch: Launch
    seeds: tuple[int, ...]
    tuning: Tuning | None = None

    def tuned(self, chosen: object, losses: Sequence[float | None]) -> Arm:
        """Return the arm with the value of its grid that was chosen."""
        assert self.tuning is not None
        place = self.tuning.values.index(chosen)
        best, value = self.tuning.candidates[place], self.tuning.values[place]
        tuning = dataclasses.replace(self.tuning, chosen=value, losses=tuple(losses))
        return dataclasses.replace(
            self, recipe=best.recipe, overrides=best.overrides, tuning=tuning
        )

    @property
    def own_seed(self) -> int:
        """The seed that the recipe names."""
        return int(self.recipe.train.get("seed", 42))

    def resolved(self) -> Mapping[str, Any]:
        """Return every resolved value by dotted key, the launch as it will be among them.

        The run's name and notes are left out; `train.seed` is a list where the arm has several, and
        `tune.KEY` is the grid of a tuned key.
        """
        launch = self.launch
        values = {
            key: value for key, value in flatten(self.recipe.to_dict()).items() if key not in OF_RUN
        }
        if self.tuning:
            values[f"tune.{self.tuning.key}"] = list(self.tuning.values)
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
    """A study that passed its check. `name` is the stem of its file, and its folder under runs/."""

    path: Path
    name: str
    question: str
    factors: Mapping[str, Sequence[str]]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    include_base: bool
    evals: tuple[EvalRecipe, ...]
    origins: Mapping[KeyPath, Origin]
    warnings: tuple[RecipeError, ...] = ()
    words: tuple[str, ...] = ()
    aims: Aims = Aims()
    baseline: str = BASE_ARM
    pairs: str = "baseline"
    reference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    text: str = field(default="", repr=False)

    def arm(self, name: str) -> Arm:
        """Return the arm of that name, or what is trained for one value of an arm's grid.

        Raises:
            RecipeError: there is none; the arms are listed.
        """
        arms = {arm.name: arm for arm in self.arms}
        tried = [one for arm in self.arms if arm.tuning for one in arm.tuning.candidates]
        known = {one.name: one for one in tried} | arms
        if name not in known:
            near, names = did_you_mean(name, arms), f"arms: {', '.join(arms)}"
            raise RecipeError(f"study '{self.name}' has no arm '{name}'", *near, names)
        return known[name]

    def factor_of(self, key: str) -> str | None:
        """Return the declared factor that may change a dotted key; None where a difference is a
        confound.
        """
        return Design(self.name, self.question, self.factors).factor_of(key)

    def differing(self) -> dict[str, Mapping[str, Any]]:
        """Return {dotted key: {arm: value}} of the keys whose values differ between arms."""
        resolved = {arm.name: arm.resolved() for arm in self.arms}
        keys = dict.fromkeys(key for values in resolved.values() for key in values)
        table = {key: {name: values.get(key) for name, values in resolved.items()} for key in keys}
        return {
            key: values
            for key, values in table.items()
            if any(value != next(iter(values.values())) for value in values.values())
        }


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
    file = study_path(path)
    if not file.exists() and file.suffix not in (".yaml", ".yml"):
        shipped = sorted(one.stem for one in (project_root() / "recipes/studies").glob("*.yaml"))
        hint = f"studies: {', '.join(shipped)}, or the path of a study file"
        raise RecipeError(f"there is no study '{path}'", hint)
    words = [word for word in overrides if _key_of(word).partition(".")[0] in SECTIONS]
    document = read(file, [word for word in overrides if word not in words])
    study, errors = _read_study(document, words)
    if study is None or errors:
        raise RecipeErrors(errors)
    return dataclasses.replace(study, words=tuple(overrides))


def check_study(path: Path, full: bool = False) -> tuple[list[RecipeError], list[RecipeError]]:
    """Return what is wrong with a study file and all that it names, and warnings; `full` adds
    stage 2 of each recipe.
    """
    document = read(path)
    study, errors = _read_study(document, [])
    if study is None or errors or not full:
        return errors, document.warnings
    arms = [
        *study.arms,
        *(one for arm in study.arms if arm.tuning for one in arm.tuning.candidates),
    ]
    found = (error for arm in arms for error in check_upstream(arm.recipe, notes=[]))
    return list({str(error): error for error in found}.values()), document.warnings


def study_path(name: str | Path) -> Path:
    """Return the file that a path or a short name (`quickstart`, `lora-rank`) means."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    places = [top / f"recipes/studies/{path.name}.yaml" for top in (Path(), project_root())]
    return next((place for place in places if place.is_file()), path)


def study_file(word: str) -> Path | None:
    """Return the file of a study given by path or short name; None where the word is no study."""
    path = recipe_path(word)
    if path.is_dir():
        return None
    path = path if path.is_file() else study_path(word)
    if not path.is_file():
        return None
    document = read(path)
    known = kind_of(document.values, document.text, document.file).name == "study"
    return path if known else None


def _key_of(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


def _read_study(document: Document, words: Sequence[str]) -> tuple[Study | None, list[RecipeError]]:
    """Return the study, and what is wrong with it and the files it names."""
    found = kind_of(document.values, document.text, document.file)
    if found.name != "study":
        raise wrong_kind(found, "study", document.file)
    arms: Any = document.values.get("arms") if isinstance(document.values, dict) else None
    for name, arm in list(arms.items()) if isinstance(arms, dict) else ():
        if isinstance(arm, str):  # short for {recipe: path}
            arms[name] = {"recipe": arm}
            document.origins["arms", name, "recipe"] = document.origin(("arms", name))
    values, errors = judge(StudyFile, document, _between_keys)
    if values is None or errors:
        return None, errors
    return _Builder(document, values, list(words)).study()


# ---- Rules between the study's own keys ----


def _between_keys(study: StudyFile, document: Document) -> Iterator[RecipeError]:
    known = [*study.arms, *([BASE_ARM] if study.include_base else [])]
    if study.baseline is not None and study.baseline not in known:
        near = did_you_mean(study.baseline, known)
        what = f"baseline: there is no arm '{study.baseline}'"
        yield document.error("baseline", what, *near, f"arms: {', '.join(known)}")
    if not study.question.strip():
        hint = "it heads the report, for example: Does rank 32 beat rank 8?"
        yield document.error("question", "question is empty", hint)
    for name in study.reference:
        if name not in (*study.arms, BASE_ARM):
            near = did_you_mean(name, study.arms)
            yield document.error(("reference", name), f"reference: no arm '{name}'", *near)
    for name in study.arms:
        yield from _wrong_name(document, name)
    lists: dict[KeyPath, list[int] | None] = {("seeds",): study.seeds}
    grids: dict[KeyPath, Mapping[str, list[Any]] | None] = {("tune",): study.tune}
    for name, arm in study.arms.items():
        lists["arms", name, "seeds"] = arm.seeds
        grids["arms", name, "tune"] = arm.tune
    for path, seeds in lists.items():
        yield from _wrong_seeds(document, path, seeds)
    for path, grid in grids.items():
        yield from _wrong_grid(document, study, path, grid or {})
    for factor, keys in study.factors.items():
        if not keys:
            hint = "name what it may change, for example [lora.r]"
            yield document.error(("factors", factor), f"factor '{factor}' names no key", hint)
        for position, key in enumerate(keys):
            if not _exists(key):
                yield _no_key(document, ("factors", factor, position), f"factor '{factor}'", key)


def _wrong_name(document: Document, name: str) -> Iterator[RecipeError]:
    place = ("arms", name)
    if name == BASE_ARM:
        what = f"'{BASE_ARM}' is the name of the base model's own arm"
        yield document.error(place, what, "choose another name")
    elif not _ARM_NAME.match(name) or name.endswith("."):
        what = f"arm name {name!r} cannot be part of a folder name"
        yield document.error(place, what, "use 1 to 60 letters, digits, '.', '_' or '-'")
    else:
        try:
            check_run_name(f"{document.path.stem}--{name}--seed0000")
        except RecipeError as error:
            what = f"arm '{name}': {error.what.replace('run.name', 'its run')}"
            yield document.error(place, what, *error.hints)


def _wrong_seeds(
    document: Document, path: KeyPath, seeds: list[int] | None
) -> Iterator[RecipeError]:
    where = dotted(path)
    if seeds == []:
        hint = "name at least one seed, or remove the key"
        yield document.error(path, f"{where} is empty", hint)
    for seed in dict.fromkeys(seeds or []):
        if seed < 0:
            yield document.error(path, f"{where}: seed {seed} must be a whole number >= 0")
        elif (seeds or []).count(seed) > 1:
            what = f"{where}: seed {seed} stands there twice: the same training twice tells nothing"
            yield document.error(path, what)


def _wrong_grid(
    document: Document, study: StudyFile, path: KeyPath, grid: Mapping[str, list[Any]]
) -> Iterator[RecipeError]:
    """A grid: one key that validation losses can be compared on, two values or more."""
    where = dotted(path)
    if len(grid) > 1:
        hint = "several grids at once are arms of the study"
        yield document.error(path, f"{where} names {len(grid)} keys; tune one", hint)
    for key, values in grid.items():
        place = (*path, key)
        if key in _GIVEN or not (key.startswith(("train.", "lora.")) or key == _BATCH):
            hint = f"keys of train and lora can, and {_BATCH}"
            yield document.error(place, f"{where}: {key} cannot be tuned", hint)
        elif key in _OF_THE_LOSS:
            what = f"{where}: {key} changes what the validation loss is a mean over"
            yield document.error(place, what, "compare arms with other values by an eval")
        elif not _exists(key):
            yield _no_key(document, place, where, key)
        elif len(values) < 2 or len(set(values)) < len(values):
            hint = f"for example {key}: [1.0e-4, 2.0e-4, 4.0e-4]"
            what = f"{where}: {key} needs two different values or more"
            yield document.error(place, what, hint)
        factor = Design("", "", study.factors).factor_of(key)
        if factor:
            what = f"{where}: {key} is what the factor '{factor}' varies"
            yield document.error(place, what, "vary it between arms, or tune it in each arm")


def _exists(key: str) -> bool:
    """Whether a dotted key, or a section, can be written in a recipe."""
    if key in _MADE_BY_LAUNCH:
        return True
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        schema = recipe_keys().get(".".join(parts[:length]))
        if schema is not None:
            return length == len(parts) or "properties" not in schema
    return False


def _no_key(document: Document, path: KeyPath, place: str, key: str) -> RecipeError:
    near = [f"did you mean {name}?" for name in near_keys(key)[:1]]
    what = f"{place}: there is no key '{key}'"
    return document.error(path, what, *near, "all keys: recipes explain")


# ---- The files that a study names ----


class _Builder:
    """Reads what a study names, collecting errors instead of stopping."""

    def __init__(self, document: Document, values: StudyFile, words: list[str]) -> None:
        self.document, self.values, self.words = document, values, words
        self.errors: list[RecipeError] = []

    def study(self) -> tuple[Study, list[RecipeError]]:
        """Return the study, and what is wrong with the files it names."""
        document, values = self.document, self.values
        arms = tuple(filter(None, (self._arm(*item) for item in values.arms.items())))
        evals = tuple(filter(None, map(self._eval, range(len(values.evals)))))
        first = next(iter(values.arms))
        study = Study(
            path=document.path,
            name=document.path.stem,
            question=values.question,
            factors={name: tuple(keys) for name, keys in values.factors.items()},
            arms=arms,
            seeds=tuple(dict.fromkeys(seed for arm in arms for seed in arm.seeds)),
            include_base=values.include_base,
            evals=evals,
            origins=document.origins,
            aims=self._aims(evals),
            baseline=values.baseline or (BASE_ARM if values.include_base else first),
            pairs=values.pairs,
            reference=values.reference,
            text=document.text,
        )
        names = [recipe.name for recipe in evals]
        for position in (number for number, name in enumerate(names) if name in names[:number]):
            hint = "name it once; another eval of that name needs another file name"
            self._wrong(("evals", position), f"evals: '{names[position]}' stands there twice", hint)
        if not self.errors:
            self._check_arms(study)
        errors = list({str(error): error for error in self.errors}.values())
        return dataclasses.replace(study, warnings=tuple(document.warnings)), errors

    def _wrong(self, path: KeyPath, what: str, *hints: str) -> None:
        self.errors.append(self.document.error(path, what, *hints))

    def _arm(self, name: str, section: ArmSection) -> Arm | None:
        """Return an arm, or None where its recipe or launch cannot be had."""
        shared = self.values
        for key in (*_LAUNCH, "seeds", "tune"):
            own, word = getattr(section, key), getattr(shared, key)
            from_words = self.document.origin((key,)).file == COMMAND_LINE
            if own and word and own != word and from_words:
                what = f"arm '{name}' has its own {key}: {own}, so {key}={word} on the command line"
                hint = "change the study file, or leave that word away"
                self._wrong(("arms", name, key), f"{what} does not reach it", hint)
        words = [*shared.overrides, *section.overrides, *self.words]
        for given in (key for key in dict.fromkeys(map(_key_of, words)) if key in _GIVEN):
            what = f"{given} cannot be overridden in a study"
            error = RecipeError(what, _GIVEN[given], file=COMMAND_LINE)
            self.errors.append(self._at_override(name, error))
        recipe = self._recipe(name, section, words)
        launch = self._launch(name, section, recipe) if recipe else None
        if recipe is None or launch is None:
            return None
        arm = Arm(name, recipe, tuple(words), launch, tuple(section.seeds or shared.seeds or ()))
        arm = arm if arm.seeds else dataclasses.replace(arm, seeds=(arm.own_seed,))
        grid = shared.tune if section.tune is None else section.tune
        return dataclasses.replace(arm, tuning=self._tuning(arm, section, grid)) if grid else arm

    def _tuning(
        self, arm: Arm, section: ArmSection, grid: Mapping[str, list[Any]]
    ) -> Tuning | None:
        """Return the grid of an arm, each value an arm of its own; None where it is wrong."""
        ((key, values),) = grid.items()
        place: KeyPath = ("tune",) if section.tune is None else ("arms", arm.name, "tune")
        problem, hint = "", "the tuning gives it its values"
        seed = arm.own_seed + _TUNING_SEED
        if key in map(_key_of, arm.overrides):
            problem = f"{key} is tuned, and set by an override"
        elif seed in arm.seeds:
            problem, hint = f"seed {seed} is that of its tuning", "choose another seed"
        elif arm.recipe.train.get("eval_strategy", "no") == "no":
            problem = "its tuning has no validation loss to choose by"
            hint = "set data.split.validation and train.eval_strategy in its recipe"
        if problem:
            self._wrong(place, f"arm '{arm.name}': {problem}", hint)
            return None
        candidates = []
        for value in values:
            words = (*arm.overrides, f"{key}={value_text(value)}")
            try:
                recipe = load_recipe(arm.recipe.path, words)
                accumulation_steps(recipe, arm.launch.world_size)
            except RecipeError as error:
                for one in error.errors:
                    self._wrong(place, f"arm '{arm.name}': {one.what}", *one.hints)
                continue
            label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.")
            name = f"{arm.name}--tune-{label}"
            candidates.append(Arm(name, recipe, words, arm.launch, (seed,)))
        names = [candidate.name for candidate in candidates]
        if len(set(names)) < len(names):
            self._wrong(place, f"two values of {key} would have one name as folders")
        return Tuning(key, tuple(values), tuple(candidates))

    def _launch(self, name: str, section: ArmSection, recipe: Recipe) -> Launch | None:
        """Return the arm's launch, once it can work."""
        flags = {key: getattr(section, key) or getattr(self.values, key) for key in _LAUNCH}
        try:
            launch = plan_launch(recipe.launch, **flags)
            accumulation_steps(recipe, launch.world_size)
        except RecipeErrors as several:
            self.errors += several.errors
            return None
        except RecipeError as error:
            # Where the launch is written: at the arm, or for all arms.
            own: list[KeyPath] = [("arms", name, key) for key in _LAUNCH if getattr(section, key)]
            shared: list[KeyPath] = [(key,) for key in _LAUNCH if getattr(self.values, key)]
            place = self.document.origin([*own, *shared, ("arms", name)][0])
            file, line = (error.file, error.line) if error.file else (place.file, place.line)
            what = f"arm '{name}': {error.what}"
            self.errors.append(RecipeError(what, *error.hints, file=file, line=line))
            return None
        return launch

    def _file(self, key: KeyPath, name: str, what: str) -> Path | None:
        """The file that a key names."""
        path = Path(self.document.absolute(key, name))
        if path.is_file():
            return Path(shown_path(path))
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("[!_]*.yaml")])
        self._wrong(key, f"{what}: {shown_path(path)}", *near)
        return None

    def _recipe(self, name: str, section: ArmSection, words: Sequence[str]) -> Recipe | None:
        path = self._file(("arms", name, "recipe"), section.recipe, f"arm '{name}': no such recipe")
        if path is None:
            return None
        try:
            load_recipe(path)
        except RecipeError as error:
            self.errors += error.errors
            return None
        try:
            return load_recipe(path, words)
        except RecipeError as error:
            self.errors += [self._at_override(name, one) for one in error.errors]
        return None

    def _at_override(self, name: str, error: RecipeError) -> RecipeError:
        """Place an error that an override of the study makes where the override is written."""
        what = f"arm '{name}': {error.what}"
        lists: dict[KeyPath, list[str]] = {
            ("arms", name, "overrides"): self.values.arms[name].overrides,
            ("overrides",): self.values.overrides,
        }
        for path, words in lists.items():
            for position, word in enumerate(words):
                if _key_of(word) in error.what or word in error.what:
                    return self.document.error((*path, position), what, *error.hints)
        return error if error.file else self.document.error(("arms", name), what, *error.hints)

    def _eval(self, position: int) -> EvalRecipe | None:
        """Return one of the study's eval recipes."""
        key = ("evals", position)
        path = self._file(key, self.values.evals[position], "no such eval recipe")
        if path is None:
            return None
        try:
            return load_eval(path)
        except RecipeError as error:
            self.errors += error.errors
            return None

    def _aims(self, evals: Sequence[EvalRecipe]) -> Aims:
        """Return what is asked of the table."""
        values = self.values
        primary = known_metrics(evals[0])[0] if evals else None
        if values.primary:
            found = [name for one in evals if (name := full_name(one, values.primary))]
            if len(found) == 1:
                primary = found[0]
            else:
                names = found or [name for one in evals for name in known_metrics(one)]
                why = "several evals measure" if found else "no eval of this study measures"
                hint = f"metrics: {', '.join(names) or 'none'}"
                self._wrong(("primary",), f"primary: {why} '{values.primary}'", hint)
        return Aims(primary, values.test_subtasks, dict(self._margins(evals)))

    def _margins(self, evals: Sequence[EvalRecipe]) -> Iterator[tuple[str, Margin]]:
        """Yield every margin that can be one of its metric."""
        for word, value in self.values.margins.items():
            margin = Margin.read(value)
            metrics = [name for one in evals if (name := full_name(one, word))]
            if margin is None:
                why = f"must be a number above 0, or one like '2 points', got {value!r}"
            elif not metrics:
                why = "no eval of this study measures it"
            else:
                why = next(filter(None, map(margin.fits, metrics)), "")
            if margin is not None and not why:
                yield word, margin
                continue
            known = ", ".join(name for one in evals for name in known_metrics(one))
            hints = [] if metrics else [f"metrics: {known or 'none'}"]
            self._wrong(("margins", word), f"margins: {word}: {why}", *hints)

    def _check_arms(self, study: Study) -> None:
        """Refuse a base that is not one model; warn of a factor that changes nothing."""
        models = {(arm.recipe.model.name_or_path, arm.recipe.model.revision) for arm in study.arms}
        if study.include_base and len(models) > 1:
            names = ", ".join(sorted(name for name, _ in models))
            what = (
                f"include_base: the arms have different base models ({names}), so there is no one"
            )
            hint = "set include_base: false, or give each base a study of its own"
            self._wrong(("include_base",), f"{what} base", hint)
        varying = study.differing()
        for factor, keys in study.factors.items() if len(study.arms) > 1 else ():
            if not any(study.factor_of(key) == factor for key in varying):
                what = f"{', '.join(keys)} has one value in all arms"
                self.document.warn(
                    ("factors", factor), f"factor '{factor}' changes nothing: {what}"
                )


# ---- Metrics by name ----


def known_metrics(recipe: EvalRecipe) -> list[str]:
    """Return the metrics of an eval by the names that a study may use, the first one of its table
    first.
    """
    known: Iterable[str] = SUITES[recipe.suite.name].metrics or recipe.suite.tasks or ()
    return [f"{recipe.name}/{metric}" for metric in known]


def full_name(recipe: EvalRecipe, word: str) -> str | None:
    """Return what a word means in an eval; None where it measures no such thing.

    Of lm_eval the tasks are known and their metrics are not, so a word must name the eval or a task
    (one of a group's begins as its group does).
    """
    known = next((name for name in known_metrics(recipe) if is_named(word, name)), None)
    if known or recipe.suite.name != "lm_eval":
        return known
    tasks = [task.rstrip("*_") for task in recipe.suite.tasks or ()]
    parts = metric_parts(word)
    if any(part == task or part.startswith(f"{task}_") for part in parts for task in tasks):
        return word if is_named(recipe.name, word) else f"{recipe.name}/{word}"
    return None
