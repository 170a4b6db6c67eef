"""What a study consists of: its steps with their inputs, as a graph. Reads files, needs no torch.

    train -> check -> answers -> judgments -> statistics -> report
                   \\-> lm_eval ----------------^
           answers of two arms -> comparison ---^

An input is what can change the result: the recipe without its comments, logging and saving keys,
the data's content, prompts and rubrics, question files. Nothing about speed, addresses or where the
checkout lies is one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes_lib.compare.design import Arm, Study
from recipes_lib.compare.design_sections import BASE_ARM
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.json_files import read_object
from recipes_lib.core.project import runs_root
from recipes_lib.data.sources import data_files, find_path, listed_sources
from recipes_lib.judging.published_prompts import PROMETHEUS_PACKAGE, REQUIREMENT
from recipes_lib.study.arms import arm_run, base_arm, base_run, study_folder
from recipes_lib.study.graph import CONTENT, ONLY_SPEED, Graph, Step, content_of, digest_of
from recipes_lib.suites.recipe import EvalRecipe
from recipes_lib.training.resume_guard import flatten, guarded_values
from recipes_lib.weights.base import base_fingerprint, fingerprint

# Raised by whoever changes what the code of a step computes. Statistics and report take seconds:
# their source itself is the version.
VERSIONS = {"train": 1, "check": 1, "answers": 1, "judgments": 1, "comparison": 1, "lm_eval": 1}
_SOURCES = (".py", ".html", ".jinja", ".j2", ".css", ".js", ".tex", ".md")
_JUDGE_FILES = (
    "relative_prompt",
    "absolute_prompt",
    "rubric",
    "reference_rubric",
)  # known by their content, whatever they are called


def build_graph(study: Study) -> Graph:
    """Return the steps of a study, upstream first."""
    return Graph(study_folder(study) / "steps", list(_Builder(study).steps()))


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is evaluated: one seed of an arm, or the base."""

    word: str
    arm: str
    seed: int | None
    run: str
    upstream: tuple[str, ...]
    inputs: Mapping[str, Any]


class _Builder:
    def __init__(self, study: Study) -> None:
        self.study = study
        self.subjects: list[_Subject] = []
        self.contents: dict[
            tuple[str, ...], dict[str, str | None]
        ] = {}  # of files that many arms share, read once

    def steps(self) -> Iterator[Step]:
        """Yield every step."""
        for arm in self.study.arms:
            if arm.trained:
                yield from self._trained(arm)
        if self.study.include_base and (model := base_arm(self.study)):
            assert model.recipe is not None
            self.subjects.insert(
                0,
                _Subject(
                    BASE_ARM,
                    BASE_ARM,
                    None,
                    base_run(self.study) or "",
                    (),
                    base_inputs(model.recipe),
                ),
            )
        last: list[Step] = []
        for recipe in self.study.evals:
            last += (
                self._harness(recipe) if recipe.suite.name == "lm_eval" else self._judged(recipe)
            )
        yield from last
        yield from self._report(last)

    def _trained(self, arm: Arm) -> Iterator[Step]:
        """Training and check of each seed."""
        assert arm.recipe is not None
        for seed in arm.seeds:
            word = arm.name if seed == arm.own_seed else f"{arm.name}.seed{seed}"
            run = arm_run(self.study, arm, seed)
            facts: dict[str, Any] = {"arm": arm.name, "seed": seed, "run": run}
            train = Step(
                f"train.{word}",
                "train",
                training_inputs(arm, seed, self._contents(arm.recipe)),
                version=VERSIONS["train"],
                **facts,
            )
            check = Step(
                f"check.{word}", "check", {}, (train.name,), version=VERSIONS["check"], **facts
            )
            self.subjects.append(_Subject(word, arm.name, seed, run, (check.name,), {}))
            yield train
            yield check

    def _contents(self, recipe: Recipe) -> dict[str, str | None]:
        key = (str(recipe.data), str(recipe.model), str(recipe.base_dir))
        if key not in self.contents:
            self.contents[key] = {**data_contents(recipe), **_base_content(recipe)}
        return self.contents[key]

    def _judged(self, recipe: EvalRecipe) -> Iterator[Step]:
        """Answers and judgments of everyone, and the comparisons of AlpacaEval."""
        answering, judging = answer_inputs(recipe), judgment_inputs(recipe)
        found: list[tuple[_Subject, Step]] = []
        for subject in self.subjects:
            facts = _facts(subject, recipe)
            name = f"answers.{recipe.name}.{subject.word}"
            step = Step(
                name,
                "answers",
                {**subject.inputs, **answering},
                subject.upstream,
                VERSIONS["answers"],
                **facts,
            )
            found.append((subject, step))
            yield step
        against_base = (
            [step.name for subject, step in found if subject.arm == BASE_ARM]
            if recipe.metrics.against == BASE_ARM
            else []
        )
        for subject, step in found:
            if against_base and subject.arm == BASE_ARM:
                continue
            upstream = (step.name, *against_base)
            name = f"judgments.{recipe.name}.{subject.word}"
            yield Step(
                name,
                "judgments",
                judging,
                upstream,
                version=VERSIONS["judgments"],
                **_facts(subject, recipe),
            )
        if recipe.suite.name == "alpaca_eval":
            yield from self._comparisons(recipe, found, judging)

    def _comparisons(
        self, recipe: EvalRecipe, found: list[tuple[_Subject, Step]], judging: Mapping[str, Any]
    ) -> Iterator[Step]:
        """Head to head in both orders: every arm against every other and the base, seed by seed."""
        by_arm: dict[str, list[tuple[_Subject, Step]]] = {}
        for subject, step in found:
            by_arm.setdefault(subject.arm, []).append((subject, step))
        for first, second in itertools.combinations(by_arm.values(), 2):
            for number in range(max(len(first), len(second))):
                (one, one_step), (other, other_step) = (
                    first[number % len(first)],
                    second[number % len(second)],
                )
                name = f"comparison.{recipe.name}.{other.word}-vs-{one.word}"
                facts = {**_facts(other, recipe), "against": one.run or one.word}
                yield Step(
                    name,
                    "comparison",
                    judging,
                    (one_step.name, other_step.name),
                    version=VERSIONS["comparison"],
                    **facts,
                )

    def _harness(self, recipe: EvalRecipe) -> Iterator[Step]:
        inputs = harness_inputs(recipe)
        for subject in self.subjects:
            name = f"lm_eval.{recipe.name}.{subject.word}"
            values = {**subject.inputs, **inputs}
            yield Step(
                name,
                "lm_eval",
                values,
                subject.upstream,
                VERSIONS["lm_eval"],
                **_facts(subject, recipe),
            )

    def _report(self, last: list[Step]) -> Iterator[Step]:
        """Statistics over everything that was measured, and the report."""
        trained = [f"train.{subject.word}" for subject in self.subjects if subject.arm != BASE_ARM]
        upstream = (*trained, *(step.name for step in last if step.kind != "answers"))
        version = source_version("compare", "foreign", "statistics", "study")
        yield Step("statistics", "statistics", report_inputs(self.study), upstream, version=version)
        yield Step(
            "report",
            "report",
            {},
            ("statistics",),
            version=source_version("compare", "foreign", "report", "study"),
        )


def _facts(subject: _Subject, recipe: EvalRecipe) -> dict[str, Any]:
    return {"arm": subject.arm, "seed": subject.seed, "run": subject.run, "eval": recipe.name}


# ---- Inputs ----


def training_inputs(arm: Arm, seed: int, contents: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what the weights of an arm depend on: its recipe without logging and saving, how it is
    launched, its data and base.

    Args:
        contents: hashes of the data and of the base.
    """
    recipe = arm.recipe
    assert recipe is not None
    launch = {key: value for key, value in arm.resolved().items() if key in _LAUNCH}
    values = guarded_values(recipe, "", arm.world_size, "", {})
    values = {
        key: value
        for key, value in values.items()
        if not key.startswith(("launch.", "data_fingerprint"))
    }
    return {**values, **launch, "train.seed": seed, **contents}


_LAUNCH = ("launch.distributed_type", "launch.world_size", "launch.mixed_precision")


def data_contents(recipe: Recipe) -> dict[str, str | None]:
    """Return the hashes of a recipe's local data files and chat template; a Hub data set is known
    by name and revision alone.
    """
    contents: dict[str, str | None] = {}
    with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
        for source in listed_sources(recipe.data):
            path = find_path(source.source, [recipe.base_dir])
            files = (
                [path]
                if path and path.is_file()
                else data_files(path, source.source_split)
                if path
                else []
            )
            for file in files:
                key, alike = f"{CONTENT}data {file.name}", 1
                while key in contents:  # a/rows.jsonl and b/rows.jsonl
                    alike += 1
                    key = f"{CONTENT}data {file.name} ({alike})"
                contents[key] = content_of(file)
    template = recipe.data.chat_template
    if template and template.endswith(".jinja"):
        contents[f"{CONTENT}chat template"] = content_of(
            recipe.folder_of("data.chat_template") / template
        )
    return contents


def _base_content(recipe: Recipe) -> dict[str, str | None]:
    fingerprint = None
    with suppress(
        RecipesError
    ):  # a model that is not there is the training's error, of this arm alone
        fingerprint = base_fingerprint(recipe)
    return {f"{CONTENT}base model": fingerprint}


def _weights_content(folder: Path) -> str:
    return fingerprint(folder)


def base_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return what the base's answers depend on: its weights, precision and the prompt format it is
    asked in.
    """
    data = {
        key: getattr(recipe.data, key)
        for key in ("prompt_format", "chat_template", "system_prompt")
    }
    values = flatten(
        {
            "model": dataclasses.asdict(recipe.model),
            "quantization": recipe.quantization,
            "data": data,
        }
    )
    return {**values, **_base_content(recipe)}


def answer_inputs(recipe: EvalRecipe) -> dict[str, Any]:
    """Return what a model's answers depend on beside the model."""
    values = {
        f"generation.{key}": value
        for key, value in dataclasses.asdict(recipe.generation).items()
        if key not in ONLY_SPEED
    }
    return {
        **values,
        "data.max_questions": recipe.data.max_questions,
        **_question_files(recipe, "questions"),
    }


def judgment_inputs(recipe: EvalRecipe) -> dict[str, Any]:
    """Return what judgments and their summary depend on beside the answers."""
    assert recipe.judge is not None
    judge = recipe.judge.judge
    values = {
        f"judge.{key}": value
        for key, value in dataclasses.asdict(judge).items()
        if key not in (*ONLY_SPEED, *_JUDGE_FILES)
    }
    values |= flatten(
        {
            "thresholds": dataclasses.asdict(recipe.judge.thresholds),
            "metrics": dataclasses.asdict(recipe.metrics),
        }
    )
    for key in _JUDGE_FILES:
        name = getattr(judge, key)
        content = (
            REQUIREMENT
            if name == PROMETHEUS_PACKAGE
            else content_of(recipe.judge.path.parent / name)
        )
        values[f"{CONTENT}judge {key.replace('_', ' ')}"] = content
    weights = Path(judge.model)
    local = judge.engine == "transformers" and any(weights.glob("*.safetensors"))
    return {
        **values,
        f"{CONTENT}judge model": _weights_content(weights) if local else None,
        **_question_files(recipe, "references"),
    }


def harness_inputs(recipe: EvalRecipe) -> dict[str, Any]:
    """Return what lm-eval's numbers depend on beside the model: options, and the task files and
    data that lie here.
    """
    values = flatten({"suite": dataclasses.asdict(recipe.suite)}) | {
        "generation.dtype": recipe.generation.dtype
    }
    if recipe.data.include_path:
        values[f"{CONTENT}tasks {recipe.data.include_path}"] = content_of(
            recipe.resolve("data.include_path", recipe.data.include_path)
        )
    elif recipe.data.folder:
        values[f"{CONTENT}data {recipe.data.folder}"] = content_of(
            recipe.resolve("data.folder", recipe.data.folder)
        )
    return values


def _question_files(recipe: EvalRecipe, key: str) -> dict[str, Any]:
    name = getattr(recipe.data, key)
    path = recipe.resolve(f"data.{key}", name) if name else None
    local = path if path is not None and path.is_file() else None
    return {
        f"data.{key}": None if local else name,
        f"{CONTENT}{key}": content_of(local) if local else None,
    }


def report_inputs(study: Study) -> dict[str, Any]:
    """Return what the report says beside what was measured: the study's own words, published
    numbers, imported files.
    """
    values: dict[str, Any] = {"question": study.question, "include_base": study.include_base}
    values |= {f"factors.{name}": list(keys) for name, keys in study.factors.items()}
    for arm in study.arms:
        values[f"arms.{arm.name}"] = {
            "cell": dict(arm.cell),
            "imported": arm.imported,
            "published_only": arm.published_only,
        }
        if not arm.trained and arm.recipe is not None:
            values[f"arms.{arm.name}.recipe"] = digest_of(arm.resolved())
        if arm.imported:
            values[f"{CONTENT}imported run {arm.imported}"] = _imported_content(
                runs_root() / arm.imported
            )
    if study.published:
        values[f"{CONTENT}published numbers"] = content_of(study.published)
    return values


def _imported_content(folder: Path) -> str | None:
    """What an imported run holds; when and by which command it was imported is not part of it."""
    if not folder.is_dir():
        return None
    state = {
        key: value
        for key, value in read_object(folder / "run.json").items()
        if key not in ("created", "updated")
    }
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("run.json", "command.txt", ".lock")
    )
    return digest_of(
        [state, *([file.relative_to(folder).as_posix(), content_of(file)] for file in files)]
    )


@lru_cache(maxsize=4)
def source_version(*packages: str) -> str:
    """Return a hash of the source files of packages."""
    here = Path(__file__).parents[1]
    files = sorted(
        file
        for package in packages
        for file in (here / package).rglob("*")
        if file.suffix in _SOURCES
    )
    return digest_of([[file.relative_to(here).as_posix(), content_of(file)] for file in files])[:16]
