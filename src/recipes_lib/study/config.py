"""A study file as an object: its keys, its arms with their recipes resolved, the declared factors,
seeds and evals. Needs no torch.

`load_study` is the only way in. What is wrong with a study, and with every recipe and eval it
names, is reported at once. As in `config.sections`, each field of a section is a key and each
`help` its documentation; the JSON Schema and the checks are generated from here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from recipes_lib.analysis.aims import Aims, Margin, is_named, metric_parts
from recipes_lib.analysis.differences import OF_RUN
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.kinds import SECTIONS
from recipes_lib.config.launch import Launch, plan_launch
from recipes_lib.config.loader import COMMAND_LINE, Document, Origin, load_document
from recipes_lib.config.preflight import check_upstream
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.config.schema import fields_of, file_schema
from recipes_lib.config.sections import LaunchSection, key
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.config.validation import KindRules, describe, dotted, load, shown
from recipes_lib.config.vocabulary import dotted_names, subschema
from recipes_lib.config.yaml_source import KeyPath
from recipes_lib.config.yaml_text import value_text
from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.core.project import check_run_name, project_root, recipe_path, shown_path
from recipes_lib.evals.recipe import SUITES, EvalRecipe, load_eval
from recipes_lib.training.resume_guard import flatten

if TYPE_CHECKING:
    from jsonschema import ValidationError

Read = TypeVar("Read")
BASE_ARM = "base"
# Values that follow from the accelerate config: a factor that may change the one may change the
# others.
_OF_ACCELERATE = ("launch.distributed_type", "launch.mixed_precision")
_MADE_BY_LAUNCH = (*_OF_ACCELERATE, "launch.world_size")
_LAUNCH = ("accelerate", "gpus", "nodes")
# What a study gives to every training itself.
_BATCH = "run.global_batch_size"
_GIVEN = {
    "train.seed": (
        "the seeds of a study stand under its own key: seeds: [1, 2], on the command line"
        " 'seeds=[1, 2]'"
    ),
    "run.name": "a run of a study is named after the study, its arm and its seed",
}
# Keys that decide which tokens a validation loss is a mean over, and in which arithmetic.
LOSS_TOKENS = (
    "model.name_or_path",
    "data.source",
    "data.subset",
    "data.revision",
    "data.source_split",
    "data.prompt_format",
    "data.chat_template",
    "data.chat_template_kwargs",
    "data.system_prompt",
    "data.chat_loss",
    "data.split.method",
    "data.split.validation",
    "data.split.test",
    "data.split.seed",
    "data.max_examples",
    "data.special_tokens",
    "train.max_length",
    "train.completion_only_loss",
    "train.assistant_only_loss",
    "train.packing",
    "train.eval_packing",
    "train.truncation_mode",
)
LOSS_PRECISION = (
    "model.dtype",
    "train.bf16",
    "train.fp16",
    "train.bf16_full_eval",
    "train.fp16_full_eval",
    "launch.mixed_precision",
)
# A tuning is trained with a seed of its own: a training that won by its validation loss is
# flattered, and the same one with an arm's seed would be that training again.
_TUNING_SEED = 1000  # more than the recipe's
TUNED = "(tuned)"  # stands where a factor would: each arm has its own best value of one grid
TUNE = "tune."  # begins the name of a grid among the resolved values
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")


@dataclass(frozen=True, kw_only=True)
class LaunchKeys:
    """How arms are launched; the study's values are the defaults of its arms."""

    accelerate: str | None = key(
        "Name of a file in accelerate_configs/, without .yaml. Absent: the recipe's"
        " launch.accelerate."
    )
    gpus: int | None = key(
        "Processes per node. Absent: the recipe's launch.gpus, else what the accelerate config"
        " says.",
        minimum=1,
    )
    nodes: int | None = key("Machines. Absent: the recipe's launch.nodes.", minimum=1)
    seeds: list[int] | None = key(
        "Values of train.seed; each is a training of its own, and the variance between them enters"
        " the intervals. Absent: the recipe's."
    )
    overrides: list[str] = key(
        "`section.key=value` words, as after `recipes train RECIPE`.", factory=list
    )
    tune: dict[str, list[bool | int | float | str]] | None = key(
        "One key and the values to try: each arm is trained with every value, and the one with the"
        " lowest validation loss is the arm, trained anew with its seeds. An arm's own grid takes"
        " the place of the study's; {} tunes nothing."
    )


@dataclass(frozen=True, kw_only=True)
class ArmSection(LaunchKeys):
    """One variant. A bare path is short for `{recipe: path}`."""

    recipe: str | None = key("The arm's recipe, relative to the study file.")


@dataclass(frozen=True, kw_only=True)
class StudySection(LaunchKeys):
    """A study: a question, the arms that answer it, and how they are evaluated."""

    question: str = field(
        metadata={"help": "What the study is to answer, as one question. It heads the report."}
    )
    factors: dict[str, list[str]] = key(
        "Factor -> the keys it may change (`lora.r`, `quantization`, ...). Every other difference"
        " between arms is listed as a confound.",
        factory=dict,
    )
    include_base: bool = key(
        "Evaluate the arms' base model too, as the arm `base`; once, however many arms there are.",
        True,
    )
    evals: list[str] = key("Eval recipes, relative to the study file.", factory=list)
    primary: str | None = key(
        "The metric of the question, for example win_rate, alpaca_eval/win_rate or lm_eval/gsm8k."
        " Its comparisons are tested before everything else. Absent: the first eval's first"
        " metric."
    )
    pairs: Literal["baseline", "all"] = key(
        "alpaca_eval: whom the answers are compared with head to head: each arm with the baseline,"
        " or with every other arm (the judge is asked as often as there are pairs).",
        "baseline",
    )
    margins: dict[str, float | str] = key(
        "Metric -> the difference that does not matter, in its unit or as '2 points'. Adds the"
        " verdicts 'not worse' and 'equivalent' within it.",
        factory=dict,
    )
    baseline: str | None = key(
        "The arm that no other may be worse than (`recipes study report --gate`), and that"
        " alpaca_eval compares the others with. Absent: base where it is evaluated, else the first"
        " arm."
    )
    test_subtasks: bool = key(
        "Test the tasks of an lm-eval group (mmlu) too. They are shown in any case, and their"
        " mean is tested.",
        False,
    )
    reference: dict[str, dict[str, float]] = key(
        "Published numbers, arm -> metric -> value in the metric's unit (a share is 0.41). Shown"
        " beside ours and never tested.",
        factory=dict,
    )


def study_schema() -> JsonSchema:
    """Return the schema of a study file; an arm is a path or a mapping."""
    keys = fields_of(StudySection)
    arm: JsonSchema = {
        "type": "object",
        "additionalProperties": False,
        "properties": fields_of(ArmSection),
    }
    arms: JsonSchema = {
        "type": "object",
        "description": "Name -> arm. A bare path is short for {recipe: path}.",
        "minProperties": 1,
        "additionalProperties": {"anyOf": [{"type": "string"}, arm]},
    }
    properties = {name: keys.pop(name) for name in ("question", "factors")} | {"arms": arms} | keys
    return file_schema("study", "A study", required=["question", "arms"], properties=properties)


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

    @property
    def inputs(self) -> dict[str, list[bool | int | float | str]]:
        """What a choice depends on beside its trainings."""
        return {self.key: list(self.values)}

    @property
    def edge(self) -> str | None:
        """Which end of the values the chosen one is, or None: inside, or no numbers."""
        numbers = [one for one in self.values if isinstance(one, int | float)]
        if self.chosen is None or len(numbers) < len(self.values):
            return None
        ends = {min(numbers): "smallest", max(numbers): "largest"}
        return ends.get(self.chosen)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arm:
    """One variant.

    `recipe` has the overrides applied, and the chosen value of a tuned arm once there is one; it is
    None for a published arm that names none. `launch` is as it will be.
    """

    name: str
    recipe: Recipe | None
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
        return int(self.recipe.train.get("seed", 42)) if self.recipe else 42

    @property
    def trained(self) -> bool:
        """Whether the study trains this arm itself: all are."""
        return True

    def resolved(self) -> Mapping[str, Any]:
        """Return every resolved value by dotted key, the launch as it will be among them.

        The run's name and notes are left out; `train.seed` is a list where the arm has several, and
        `tune.KEY` is the grid of a tuned key. Empty without a recipe.
        """
        if self.recipe is None:
            return {}
        values, launch = flatten(self.recipe.to_dict()), self.launch
        values = {key: value for key, value in values.items() if key not in OF_RUN}
        if self.tuning:
            values[f"{TUNE}{self.tuning.key}"] = list(self.tuning.values)
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
    factors: Mapping[str, tuple[str, ...]]
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
        found = {one.name: one for one in tried} | arms
        if name not in found:
            near, names = did_you_mean(name, arms), f"arms: {', '.join(arms)}"
            raise RecipeError(f"study '{self.name}' has no arm '{name}'", *near, names)
        return found[name]

    def factor_of(self, key: str) -> str | None:
        """Return the declared factor that may change a dotted key; None where a difference is a
        confound.
        """
        for factor, prefixes in self.factors.items():
            for prefix in prefixes:
                made = prefix == "launch.accelerate" and key in _OF_ACCELERATE
                if key == prefix or key.startswith(f"{prefix}.") or made:
                    return factor
        return None

    def differing(self) -> dict[str, Mapping[str, Any]]:
        """Return {dotted key: {arm: value}} of the keys whose values differ between arms with a
        recipe.
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
    words = [word for word in overrides if _key_of(word).partition(".")[0] in SECTIONS]
    file = study_path(path)
    if not file.exists() and file.suffix not in (".yaml", ".yml"):
        shipped = sorted(one.stem for one in (project_root() / "recipes/studies").glob("*.yaml"))
        raise RecipeError(
            f"there is no study '{path}'",
            f"studies: {', '.join(shipped)}, or the path of a study file",
        )
    document = load(file, "study", [word for word in overrides if word not in words])
    study, errors = _Reader(document, words).study()
    if errors:
        raise RecipeErrors(errors)
    return dataclasses.replace(study, words=tuple(overrides))


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
    known = path.is_file() and load_document(path, keep_going=True).kind.name == "study"
    return path if known else None


class StudyRules(KindRules):
    """Rules of studies, whose top-level keys are values and no sections."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with every bare path of an arm written as `{recipe: path}`."""
        arms = values.get("arms")
        if not isinstance(arms, dict):
            return values
        whole = {
            name: {"recipe": arm} if isinstance(arm, str) else arm for name, arm in arms.items()
        }
        return {**values, "arms": whole}

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
        study, arms = _sections(document)
        yield from _wrong_names(document, study, arms)
        for name, arm in arms.items():
            yield from _wrong_arm(document, study, name, arm)
            yield from _wrong_grid(document, study, ("arms", name, "tune"), arm.tune)
        yield from _wrong_grid(document, study, ("tune",), study.tune)
        yield from _wrong_factors(document, study)
        yield from _wrong_reference(document, study, arms)

    def further(self, document: Document, full: bool, sound: bool) -> list[RecipeError]:
        """Return what is wrong with the recipes and evals it names; `full` adds stage 2 of each
        recipe.
        """
        if not sound:
            return []
        study, errors = _Reader(document, []).study()
        if errors or not full:
            return errors
        recipes = [arm.recipe for arm in study.arms if arm.recipe]
        tunings = [arm.tuning for arm in study.arms if arm.tuning]
        recipes += [one.recipe for tuning in tunings for one in tuning.candidates if one.recipe]
        return _once(error for recipe in recipes for error in check_upstream(recipe, notes=[]))


def _sections(document: Document) -> tuple[StudySection, dict[str, ArmSection]]:
    """The study's own keys and its arms, of a document that the schema accepts."""
    values = dict(StudyRules().whole(document.values))
    arms = {name: ArmSection(**arm) for name, arm in values.pop("arms").items()}
    return StudySection(**values), arms


def _key_of(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


def _once(errors: Iterable[RecipeError]) -> list[RecipeError]:
    return list({str(error): error for error in errors}.values())


def _wrong_names(
    document: Document, study: StudySection, arms: Mapping[str, ArmSection]
) -> Iterator[RecipeError]:
    """The study's question, names and seeds."""
    known = [*arms, *([BASE_ARM] if study.include_base else [])]
    if study.baseline is not None and study.baseline not in known:
        what = f"baseline: there is no arm '{study.baseline}'"
        near = did_you_mean(study.baseline, known)
        yield document.error(("baseline",), what, *near, f"arms: {_list(known)}")
    if not study.question.strip():
        yield document.error(
            ("question",),
            "question is empty",
            "it heads the report, for example: Does rank 32 beat rank 8?",
        )
    for name in arms:
        place = ("arms", name)
        if not _ARM_NAME.match(name) or name.endswith("."):
            what = f"arm name {name!r} cannot be part of a folder name"
            yield document.error(place, what, "use 1 to 60 letters, digits, '.', '_' or '-'")
            continue
        try:
            check_run_name(f"{document.path.stem}--{name}--seed0000")
        except RecipeError as error:
            what = f"arm '{name}': {error.what.replace('run.name', 'its run')}"
            yield document.error(place, what, *error.hints)
    lists: dict[KeyPath, list[int] | None] = {("seeds",): study.seeds}
    lists |= {("arms", name, "seeds"): arm.seeds for name, arm in arms.items()}
    for path, seeds in lists.items():
        where = dotted(path)
        if seeds == []:
            what = f"{where} is empty"
            yield document.error(path, what, "name at least one seed, or remove the key")
        for seed in dict.fromkeys(seeds or []):
            if seed < 0:
                yield document.error(path, f"{where}: seed {seed} must be a whole number >= 0")
            elif (seeds or []).count(seed) > 1:
                what = "stands there twice: the same training twice tells nothing"
                yield document.error(path, f"{where}: seed {seed} {what}")


def _wrong_arm(
    document: Document, study: StudySection, name: str, arm: ArmSection
) -> Iterator[RecipeError]:
    """An arm is a recipe that is trained."""
    path = ("arms", name)
    if not arm.recipe:
        yield document.error(path, f"arm '{name}' has no recipe", "name one: recipe: FILE")
    if name == BASE_ARM:
        what = f"'{BASE_ARM}' is the name of the base model's own arm"
        yield document.error(path, what, "choose another name")
    idle = [key for key in ("seeds", *_LAUNCH) if getattr(arm, key) and not arm.recipe]
    if idle:
        what = f"arm '{name}': {idle[0]} has no meaning without a recipe"
        yield document.error((*path, idle[0]), what)


def _wrong_grid(
    document: Document, study: StudySection, path: KeyPath, grid: Mapping[str, list[Any]] | None
) -> Iterator[RecipeError]:
    """A grid: one key that validation losses can be compared on, two values or more."""
    where = dotted(path)
    if grid and len(grid) > 1:
        hint = "several grids at once are arms of the study: factors, with an arm for each cell"
        yield document.error(path, f"{where} names {len(grid)} keys; tune one", hint)
    for tuned, values in (grid or {}).items():
        place = (*path, tuned)
        if tuned in _GIVEN or not (tuned.startswith(("train.", "lora.")) or tuned == _BATCH):
            what = f"{where}: {tuned} cannot be tuned"
            yield document.error(place, what, f"keys of train and lora can, and {_BATCH}")
        elif tuned in (*LOSS_TOKENS, *LOSS_PRECISION):
            hint = "compare arms with other values by an eval"
            what = f"{where}: {tuned} changes what the validation loss is a mean over"
            yield document.error(place, what, hint)
        elif not _exists(tuned):
            yield _no_key(document, place, where, tuned)
        elif len(values) < 2 or len(set(values)) < len(values):
            hint = f"for example {tuned}: [1.0e-4, 2.0e-4, 4.0e-4]"
            what = f"{where}: {tuned} needs two different values or more"
            yield document.error(place, what, hint)
        for factor, prefixes in study.factors.items():
            if any(tuned == prefix or tuned.startswith(f"{prefix}.") for prefix in prefixes):
                what = f"{where}: {tuned} is what the factor '{factor}' varies"
                yield document.error(place, what, "vary it between arms, or tune it in each arm")


def _wrong_factors(document: Document, study: StudySection) -> Iterator[RecipeError]:
    """Factors name keys that exist."""
    factors = study.factors
    for factor, prefixes in factors.items():
        path: KeyPath = ("factors", factor)
        if not prefixes:
            hint = "name what it may change, for example [lora.r]"
            yield document.error(path, f"factor '{factor}' names no key", hint)
        for position, prefix in enumerate(prefixes):
            if not _exists(prefix):
                place = (*path, position)
                hint = "all keys: recipes explain"
                yield _no_key(document, place, f"factor '{factor}'", prefix, hint)


def _wrong_reference(
    document: Document, study: StudySection, arms: Mapping[str, ArmSection]
) -> Iterator[RecipeError]:
    """Published numbers are of arms that are there."""
    known = [*arms, BASE_ARM]
    for name in study.reference:
        if name not in known:
            near = did_you_mean(name, known)
            yield document.error(("reference", name), f"reference: no arm '{name}'", *near)


def _exists(key: str) -> bool:
    """Whether a dotted key, or a section, can be written in a recipe."""
    if key in _MADE_BY_LAUNCH:
        return True
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        schema = subschema(*parts[:length])
        if schema is not None:
            return length == len(parts) or "properties" not in schema
    return False


def _no_key(document: Document, path: KeyPath, whose: str, key: str, *hints: str) -> RecipeError:
    near = [f"did you mean {name}?" for name in dotted_names(key)[:1]]
    return document.error(path, f"{whose}: there is no key '{key}'", *near, *hints)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


class _Reader:
    """Reads what a study names, collecting errors instead of stopping."""

    def __init__(self, document: Document, words: Sequence[str]) -> None:
        self.document, self.words = document, list(words)
        self.own, self.sections = _sections(document)
        self.errors: list[RecipeError] = []

    def study(self) -> tuple[Study, list[RecipeError]]:
        """Return the study, and what is wrong with the files it names."""
        document, own = self.document, self.own
        arms = tuple(filter(None, (self._arm(*item) for item in self.sections.items())))
        evals = tuple(filter(None, map(self._eval, range(len(own.evals)))))
        own_base = any(arm.name == BASE_ARM for arm in arms)
        with_base, first = own.include_base and not own_base, next(iter(self.sections))
        study = Study(
            path=document.path,
            name=document.path.stem,
            question=own.question,
            factors={name: tuple(keys) for name, keys in own.factors.items()},
            arms=arms,
            seeds=tuple(dict.fromkeys(seed for arm in arms for seed in arm.seeds)),
            include_base=with_base,
            evals=evals,
            origins=document.origins,
            aims=self._aims(evals),
            baseline=own.baseline or (BASE_ARM if with_base or own_base else first),
            pairs=own.pairs,
            reference=own.reference,
            text=document.text,
        )
        problems = _once(self.errors) or self._twice([one.name for one in evals])
        if not problems:
            problems = self._bases(study)
            self._warn_of_levels(study)
        return dataclasses.replace(study, warnings=tuple(document.warnings)), problems

    def _wrong(self, path: KeyPath, what: str, *hints: str) -> None:
        self.errors.append(self.document.error(path, what, *hints))

    def _try(self, read: Callable[[Path], Read], path: Path) -> Read | None:
        """What a function reads, or None where it raises; its errors are kept."""
        try:
            return read(path)
        except RecipeError as error:
            self.errors += error.errors
            return None

    def _arm(self, name: str, section: ArmSection) -> Arm | None:
        """Return an arm, or None where its recipe or launch cannot be had."""
        study = self.own
        for one in (*_LAUNCH, "seeds", "tune"):
            own, word = getattr(section, one), getattr(study, one)
            if own and word and own != word and self.document.origin((one,)).file == COMMAND_LINE:
                # It would change the other arms and not this one, which has a value of its own.
                told = f"arm '{name}' has its own {one}: {own}"
                what = f"{told}, so {one}={word} on the command line does not reach it"
                hint = "change the study file, or leave that word away"
                self._wrong(("arms", name, one), what, hint)
        words = [*study.overrides, *section.overrides, *self.words]
        for given in dict.fromkeys(map(_key_of, words)):
            if given in _GIVEN:
                what = f"{given} cannot be overridden in a study"
                error = RecipeError(what, _GIVEN[given], file=COMMAND_LINE)
                self.errors.append(self._at_override(name, error))
        recipe = self._recipe(name, section, words)
        if recipe is None and section.recipe is not None:
            return None
        launch = self._launch(name, section, study, recipe)
        if launch is None:
            return None
        arm = Arm(
            name=name,
            recipe=recipe,
            overrides=tuple(words),
            launch=launch,
            seeds=tuple(section.seeds or study.seeds or ()),
        )
        arm = arm if arm.seeds else dataclasses.replace(arm, seeds=(arm.own_seed,))
        grid = study.tune if section.tune is None else section.tune
        return dataclasses.replace(arm, tuning=self._tuning(arm, section, grid)) if grid else arm

    def _tuning(
        self, arm: Arm, section: ArmSection, grid: Mapping[str, list[Any]]
    ) -> Tuning | None:
        """Return the grid of an arm, each value an arm of its own; None where it is wrong."""
        assert arm.recipe is not None
        ((key, values),) = grid.items()
        place: KeyPath = ("tune",) if section.tune is None else ("arms", arm.name, "tune")
        problem, hints = "", ("the tuning gives it its values",)
        seed = arm.own_seed + _TUNING_SEED
        if key in map(_key_of, arm.overrides):
            problem = f"{key} is tuned, and set by an override"
        elif seed in arm.seeds:
            problem, hints = f"seed {seed} is that of its tuning", ("choose another seed",)
        elif arm.recipe.train.get("eval_strategy", "no") == "no":
            problem = "its tuning has no validation loss to choose by"
            hints = ("set data.split.validation and train.eval_strategy in its recipe",)
        if problem:
            self._wrong(place, f"arm '{arm.name}': {problem}", *hints)
            return None
        candidates = []
        for value in values:
            words = (*arm.overrides, f"{key}={value_text(value)}")
            try:
                recipe = load_recipe(arm.recipe.path, words)
                accumulation_steps(recipe, arm.launch.world_size)
            except RecipeError as error:
                self.errors += [
                    self.document.error(place, f"arm '{arm.name}': {one.what}", *one.hints)
                    for one in error.errors
                ]
                continue
            label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-.")
            name = f"{arm.name}--tune-{label}"
            one = dataclasses.replace(
                arm, name=name, recipe=recipe, overrides=words, seeds=(seed,), tuning=None
            )
            candidates.append(one)
        names = [one.name for one in candidates]
        if len(set(names)) < len(names):
            what = f"two values of {key} would have one name as folders"
            self._wrong(place, what)
        return Tuning(key, tuple(values), tuple(candidates))

    def _launch(
        self, name: str, section: ArmSection, study: LaunchKeys, recipe: Recipe | None
    ) -> Launch | None:
        """Return the arm's launch, once it can work."""
        if recipe is None:  # nothing is launched
            return plan_launch(LaunchSection(), "single_gpu")
        try:
            launch = plan_launch(
                recipe.launch,
                **{key: getattr(section, key) or getattr(study, key) for key in _LAUNCH},
            )
            accumulation_steps(recipe, launch.world_size)
        except RecipeErrors as several:
            self.errors += several.errors
        except RecipeError as error:
            # Where the launch is written: at the arm, or for all arms.
            own: list[KeyPath] = [("arms", name, one) for one in _LAUNCH if getattr(section, one)]
            shared: list[KeyPath] = [(one,) for one in _LAUNCH if getattr(self.own, one)]
            where = self.document.origin([*own, *shared, ("arms", name)][0])
            file, line = (error.file, error.line) if error.file else (where.file, where.line)
            self.errors.append(
                RecipeError(f"arm '{name}': {error.what}", *error.hints, file=file, line=line)
            )
        else:
            return launch
        return None

    def _file(self, key: KeyPath, name: str, what: str) -> Path | None:
        """The file that a key names."""
        path = self.document.folder(key) / name
        if path.is_file():
            return path
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("[!_]*.yaml")])
        self._wrong(key, f"{what}: {shown_path(path)}", *near)
        return None

    def _recipe(self, name: str, section: ArmSection, words: Sequence[str]) -> Recipe | None:
        if section.recipe is None:
            return None
        path = self._file(("arms", name, "recipe"), section.recipe, f"arm '{name}': no such recipe")
        if path is None or self._try(load_recipe, path) is None:
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
            ("arms", name, "overrides"): self.sections[name].overrides,
            ("overrides",): self.own.overrides,
        }
        for path, words in lists.items():
            for position, word in enumerate(words):
                if _key_of(word) in error.what or word in error.what:
                    return self.document.error((*path, position), what, *error.hints)
        return error if error.file else self.document.error(("arms", name), what, *error.hints)

    def _eval(self, position: int) -> EvalRecipe | None:
        """Return one of the study's eval recipes."""
        key = ("evals", position)
        path = self._file(key, self.own.evals[position], "no such eval recipe")
        return self._try(load_eval, path) if path else None

    def _aims(self, evals: Sequence[EvalRecipe]) -> Aims:
        """Return what is asked of the table."""
        own = self.own
        primary = own.primary or (known_metrics(evals[0])[0] if evals else None)
        if own.primary:
            found = [name for one in evals if (name := full_name(one, own.primary))]
            if len(found) == 1:
                primary = found[0]
            else:
                names = found or [name for one in evals for name in known_metrics(one)]
                why = "several evals measure" if found else "no eval of this study measures"
                what = f"primary: {why} '{own.primary}'"
                hint = f"metrics: {_list(names)}"
                self._wrong(("primary",), what, hint)
        return Aims(primary, own.test_subtasks, dict(self._margins(evals)))

    def _margins(self, evals: Sequence[EvalRecipe]) -> Iterator[tuple[str, Margin]]:
        """Yield every margin that can be one of its metric."""
        for word, value in self.own.margins.items():
            margin = Margin.read(value)
            metrics = [name for one in evals if (name := full_name(one, word))]
            if margin is None:
                wrong = [f"must be a number above 0, or one like '2 points', got {shown(value)}"]
            elif not metrics:
                wrong = ["no eval of this study measures it"]
            else:
                wrong = [why for name in metrics if (why := margin.fits(name))]
            if margin is None or wrong:
                known = [name for one in evals for name in known_metrics(one)]
                hints = [] if metrics else [f"metrics: {_list(known)}"]
                what = f"margins: {word}: {wrong[0]}"
                self._wrong(("margins", word), what, *hints)
            else:
                yield word, margin

    def _twice(self, names: Sequence[str]) -> list[RecipeError]:
        """Every eval whose results would lie in the folder of one before it."""
        hint = "name it once; another eval of that name needs another file name"
        return [
            self.document.error(("evals", position), f"evals: '{name}' stands there twice", hint)
            for position, name in enumerate(names)
            if name in names[:position]
        ]

    def _bases(self, study: Study) -> list[RecipeError]:
        """Return an error where `include_base` does not mean one model."""
        models = {
            (arm.recipe.model.name_or_path, arm.recipe.model.revision)
            for arm in study.arms
            if arm.recipe and arm.trained
        }
        if not study.include_base or len(models) < 2:
            return []
        names = ", ".join(sorted(name for name, _ in models))
        what = f"the arms have different base models ({names}), so there is no one base"
        hint = "set include_base: false, or give each base a study of its own"
        return [self.document.error(("include_base",), f"include_base: {what}", hint)]

    def _warn_of_levels(self, study: Study) -> None:
        """Add warnings where the declared levels and the recipes do not fit together."""

        def warn(path: KeyPath, what: str, *hints: str) -> None:
            self.document.warnings.append(self.document.error(path, f"warning: {what}", *hints))

        known = [arm for arm in study.arms if arm.recipe is not None]
        varying = study.differing()
        for factor, prefixes in study.factors.items():
            keys = [key for key in varying if study.factor_of(key) == factor]
            if len(known) > 1 and not keys:
                what = f"{_list(prefixes)} has one value in all arms"
                warn(("factors", factor), f"factor '{factor}' changes nothing: {what}")
                continue


# ---- Metrics by name ----


def known_metrics(recipe: EvalRecipe) -> list[str]:
    """Return the metrics of an eval by the names that a study may use, the first one of its table
    first.
    """
    known = SUITES[recipe.suite.name].metrics or recipe.suite.tasks or ()
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
