"""What a study consists of: its steps with their inputs, as a graph. Reads files, needs no torch.

    tune -> choose -> train -> check -> answers -> judgments -> statistics -> report
                                    \\-> lm_eval ----------------^
                            answers of two arms -> comparison ---^

An input is what can change the result: the recipe without its comments, logging and saving keys,
the data's content, prompts and rubrics, question files. Nothing about speed, addresses or where the
checkout lies is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from recipes_lib.compare.design import BASE_ARM, Arm, Study
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ASKED
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.data.sources import data_files, find_path, listed_sources
from recipes_lib.eval_recipe import UNJUDGED, EvalRecipe
from recipes_lib.judging.prometheus import PROMETHEUS_PACKAGE, REQUIREMENT
from recipes_lib.study.arms import arm_run, base_arm, base_run, choice_name, study_folder
from recipes_lib.study.graph import (
    CONTENT,
    FOLLOWS,
    ONLY_SPEED,
    Graph,
    Inputs,
    Step,
    content_of,
    digest_of_files,
)
from recipes_lib.training.resume_guard import flatten, guarded_values
from recipes_lib.weights.base import base_fingerprint, fingerprint

# Raised by whoever changes what the code of a step computes. Statistics and report take seconds:
# their source itself is the version.
_VERSIONED = ("train", "choose", "check", "answers", "judgments", "comparison", *UNJUDGED)
VERSIONS = dict.fromkeys(_VERSIONED, 1)
_SOURCES = (".py", ".html", ".jinja", ".j2", ".css", ".js", ".tex", ".md")


def build_graph(study: Study) -> Graph:
    """Return the steps of a study, upstream first."""
    return Graph(study_folder(study) / "steps", list(_steps(study)))


@dataclass(frozen=True)
class _Subject:
    """What is evaluated: one seed of an arm, or the base. `inputs` are those of its answers."""

    word: str
    arm: str
    seed: int | None
    run: str
    upstream: tuple[str, ...] = ()
    inputs: Inputs = field(default_factory=dict)

    def step(
        self,
        kind: str,
        inputs: Inputs,
        upstream: tuple[str, ...] = (),
        eval: str = "",
        other: _Subject | None = None,
    ) -> Step:
        """Return a step about it, against another subject where the step compares two."""
        word = f"{self.word}-vs-{other.word}" if other else self.word
        name = ".".join(filter(None, (kind, eval, word)))
        against = (other.run or other.word) if other else ""
        about = (self.arm, self.seed, self.run, eval, against)
        version = VERSIONS["train" if kind == "tune" else kind]
        return Step(name, kind, inputs, upstream, version, *about)


def _steps(study: Study) -> Iterator[Step]:
    subjects: list[_Subject] = []
    contents: dict[tuple[str, ...], dict[str, str | None]] = {}  # many arms share files: read once
    trained: list[str] = []
    for arm in study.arms:
        if not arm.trained:
            continue
        recipe = arm.recipe
        assert recipe is not None
        key = (str(recipe.data), str(recipe.model))
        if key not in contents:
            contents[key] = {**data_contents(recipe), **_base_content(recipe)}
        before: tuple[str, ...] = ()
        if arm.tuning:
            tunings = list(_tunings(study, arm, contents[key]))
            yield from tunings
            names = tuple(step.name for step in tunings)
            grid = _Subject(arm.name, arm.name, None, "")
            choice = grid.step("choose", arm.tuning.inputs, names)
            yield choice
            before = (choice.name,)
        for seed in arm.seeds:
            word = arm.name if seed == arm.own_seed else f"{arm.name}.seed{seed}"
            subject = _Subject(word, arm.name, seed, arm_run(study, arm, seed))
            train = subject.step("train", training_inputs(arm, seed, contents[key]), before)
            check = subject.step("check", {}, (train.name,))
            yield train
            yield check
            trained.append(train.name)
            subjects.append(replace(subject, upstream=(check.name,)))
    if study.include_base and (model := base_arm(study)):
        assert model.recipe is not None
        asked = base_inputs(model.recipe)
        base = _Subject(BASE_ARM, BASE_ARM, None, base_run(study) or "", inputs=asked)
        subjects.insert(0, base)
    held_out = dict(next(iter(contents.values()), {}))
    measured: list[Step] = []
    for one in study.evals:
        of_eval = list(_evaluations(one, subjects, held_out))
        yield from of_eval
        measured += of_eval
    upstream = (*trained, *(step.name for step in measured if step.kind != "answers"))
    readers = ("compare", "eval_files.py", "eval_log.py", "statistics", "study")
    version = source_version(*readers, "statistics")
    yield Step("statistics", "statistics", report_inputs(study), upstream, version)
    version = source_version(*readers, "report")
    yield Step("report", "report", {}, ("statistics",), version)


def _tunings(study: Study, arm: Arm, contents: Mapping[str, str | None]) -> Iterator[Step]:
    """Yield the training of each value of an arm's grid."""
    assert arm.tuning is not None
    for value, candidate in zip(arm.tuning.values, arm.tuning.candidates, strict=True):
        (seed,) = candidate.seeds
        run = arm_run(study, candidate, seed)
        subject = _Subject(f"{arm.name}.{value}", candidate.name, seed, run)
        yield subject.step("tune", training_inputs(candidate, seed, contents))


def _evaluations(
    recipe: EvalRecipe, subjects: Sequence[_Subject], held_out: Inputs
) -> Iterator[Step]:
    """Yield everyone's numbers where no judge decides, or everyone's answers and judgments, and the
    comparisons of AlpacaEval: head to head in both orders, every arm against every other and the
    base, seed by seed.

    Args:
        held_out: contents that the base's held-out rows come from; an arm's are its training's.
    """
    kind = recipe.suite.name
    if not recipe.is_judged:
        inputs = harness_inputs(recipe) if kind == "lm_eval" else answer_inputs(recipe)
        inputs = {**inputs, **(held_out if kind == "heldout_loss" else {})}
        for subject in subjects:
            values = {**subject.inputs, **inputs}
            yield subject.step(kind, values, subject.upstream, recipe.name)
        return
    answering, judging = answer_inputs(recipe), judgment_inputs(recipe)
    answers: dict[str, str] = {}
    for subject in subjects:
        values = {**subject.inputs, **answering}
        step = subject.step("answers", values, subject.upstream, recipe.name)
        answers[subject.word] = step.name
        yield step
    to_base = recipe.metrics.against == BASE_ARM and BASE_ARM in answers
    for subject in subjects:
        if not (to_base and subject.arm == BASE_ARM):
            needed = (answers[subject.word], *([answers[BASE_ARM]] if to_base else []))
            yield subject.step("judgments", judging, needed, recipe.name)
    if recipe.suite.name != "alpaca_eval":
        return
    by_arm: dict[str, list[_Subject]] = {}
    for subject in subjects:
        by_arm.setdefault(subject.arm, []).append(subject)
    for first, second in itertools.combinations(by_arm.values(), 2):
        for number in range(max(len(first), len(second))):
            one, other = first[number % len(first)], second[number % len(second)]
            needed = (answers[one.word], answers[other.word])
            yield other.step("comparison", judging, needed, recipe.name, one)


# ---- Inputs ----


def training_inputs(arm: Arm, seed: int, contents: Mapping[str, str | None]) -> Inputs:
    """Return what the weights of an arm depend on: its recipe without logging and saving, how it is
    launched, its data and base.

    Args:
        contents: hashes of the data and of the base.
    """
    recipe = arm.recipe
    assert recipe is not None
    resolved = arm.resolved()
    launch = (f"launch.{key}" for key in ("distributed_type", "world_size", "mixed_precision"))
    values = guarded_values(recipe, "", arm.launch.world_size, "", {})
    values = {
        key: value
        for key, value in values.items()
        if not key.startswith(("launch.", "data_fingerprint"))
    }
    if arm.tuning and arm.tuning.chosen is None:
        values[arm.tuning.key] = f"unknown: {choice_name(arm)} {FOLLOWS[1]}"
    return {
        **values,
        **{key: resolved[key] for key in launch},
        "train.seed": seed,
        **contents,
    }


def data_contents(recipe: Recipe) -> dict[str, str | None]:
    """Return the hashes of a recipe's local data files and chat template; a Hub data set is known
    by name and revision alone.
    """
    contents: dict[str, str | None] = {}
    with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
        for source in listed_sources(recipe.data):
            path = find_path(source.source)
            if path is None:
                continue
            for file in [path] if path.is_file() else data_files(path, source.source_split):
                key, alike = f"{CONTENT}data {file.name}", 1
                while key in contents:  # a/rows.jsonl and b/rows.jsonl
                    alike += 1
                    key = f"{CONTENT}data {file.name} ({alike})"
                contents[key] = content_of(file)
    template = recipe.data.chat_template
    if template and template.endswith(".jinja"):
        contents[f"{CONTENT}chat template"] = content_of(Path(template))
    return contents


def _base_content(recipe: Recipe) -> dict[str, str | None]:
    known = None
    with suppress(RecipesError):  # a model that is not there is the training's error, of one arm
        known = base_fingerprint(recipe)
    return {f"{CONTENT}base model": known}


def base_inputs(recipe: Recipe) -> Inputs:
    """Return what the base's answers depend on: its weights, precision and the prompt format it is
    asked in.
    """
    written = recipe.to_dict()["data"]
    data = {key: written[key] for key in ASKED}
    model = {"model": asdict(recipe.model), "quantization": recipe.quantization, "data": data}
    return {**flatten(model), **_base_content(recipe)}


def answer_inputs(recipe: EvalRecipe) -> Inputs:
    """Return what a model's answers depend on beside the model."""
    values = {
        f"generation.{key}": value
        for key, value in asdict(recipe.generation).items()
        if key not in ONLY_SPEED
    }
    return {
        **values,
        "data.max_questions": recipe.data.max_questions,
        **_question_files(recipe, "questions"),
    }


def judgment_inputs(recipe: EvalRecipe) -> Inputs:
    """Return what judgments and their summary depend on beside the answers."""
    assert recipe.judge is not None
    judge = recipe.judge.judge
    texts = recipe.judge.texts()  # known by their content, whatever they are called
    values = {
        f"judge.{key}": value
        for key, value in asdict(judge).items()
        if key not in ONLY_SPEED and key not in texts
    }
    thresholds, metrics = asdict(recipe.judge.thresholds), asdict(recipe.metrics)
    values |= flatten({"thresholds": thresholds, "metrics": metrics})
    for key, path in texts.items():
        packaged = getattr(judge, key) == PROMETHEUS_PACKAGE
        content = REQUIREMENT if packaged else content_of(path)
        values[f"{CONTENT}judge {key.replace('_', ' ')}"] = content
    weights = Path(judge.model)
    local = judge.engine == "transformers" and any(weights.glob("*.safetensors"))
    values[f"{CONTENT}judge model"] = fingerprint(weights) if local else None
    if labels := recipe.data.labels:  # from none to some is a change too
        content = content_of(recipe.resolve("data.labels", labels))
        values["data.labels"] = content and content[:12]
    return {**values, **_question_files(recipe, "references")}


def harness_inputs(recipe: EvalRecipe) -> Inputs:
    """Return what lm-eval's numbers depend on beside the model: options, and the task files and
    data that lie here.
    """
    values = flatten({"suite": asdict(recipe.suite)})
    values["generation.dtype"] = recipe.generation.dtype
    tasks, data = recipe.data.include_path, recipe.data.folder
    if tasks:
        values[f"{CONTENT}tasks {tasks}"] = content_of(recipe.resolve("data.include_path", tasks))
    elif data:
        values[f"{CONTENT}data {data}"] = content_of(recipe.resolve("data.folder", data))
    return values


def _question_files(recipe: EvalRecipe, key: str) -> Inputs:
    name = getattr(recipe.data, key)
    path = recipe.resolve(f"data.{key}", name) if name else None
    local = path if path is not None and path.is_file() else None
    return {
        f"data.{key}": None if local else name,
        f"{CONTENT}{key}": content_of(local) if local else None,
    }


def report_inputs(study: Study) -> Inputs:
    """Return what the report says beside what was measured: the study's own words and published
    numbers.
    """
    values: dict[str, object] = {"question": study.question, "include_base": study.include_base}
    values |= {"primary": study.aims.primary, "test_subtasks": study.aims.subtasks}
    values |= {f"margins.{word}": one.size for word, one in study.aims.margins.items()}
    values |= {f"factors.{name}": list(keys) for name, keys in study.factors.items()}
    for arm in study.arms:
        values[f"arms.{arm.name}"] = {
            "cell": dict(arm.cell),
            "published_only": arm.published_only,
        }
        if tuning := arm.tuning:
            tried = [tuning.key, tuning.values, tuning.losses]
            values[f"{CONTENT}tuning of {arm.name}"] = digest_of(tried)
        if not arm.trained and arm.recipe is not None:
            values[f"arms.{arm.name}.recipe"] = digest_of(arm.resolved())
    if study.published:
        values[f"{CONTENT}published numbers"] = content_of(study.published)
    return values


@lru_cache(maxsize=4)
def source_version(*packages: str) -> str:
    """Return a hash of the source files of packages and modules."""
    here = Path(__file__).parents[1]
    found = {file for name in packages for file in (here / name, *(here / name).rglob("*"))}
    return digest_of_files(here, [file for file in found if file.suffix in _SOURCES])[:16]
