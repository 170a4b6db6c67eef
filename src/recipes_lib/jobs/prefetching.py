"""What a recipe, a study or an eval needs from elsewhere: fetched on the login node, and found
again without a network. Weights are checked by their headers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.config.documents import read
from recipes_lib.config.preflight import TOKENIZER_FILES, local_folder, weight_faults
from recipes_lib.config.recipe import ModelSection, Recipe, SourcePart, load_recipe
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.data.sources import listed_sources, load_rows
from recipes_lib.evals.models import bare_recipe
from recipes_lib.evals.prompts import PROMETHEUS, PROMETHEUS_PACKAGE, published_template
from recipes_lib.evals.questions import MT_BENCH, MT_BENCH_PACKAGE, load_questions
from recipes_lib.evals.recipe import ROW_SUITES, EvalRecipe, load_eval
from recipes_lib.models.packaged import MODEL, materialise
from recipes_lib.study.config import load_study, study_file
from recipes_lib.weights.load import explain_load_failure

_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]


@dataclass(frozen=True)
class Need:
    """What is needed: `look(True)` fetches it, `look(False)` finds it, and both describe it."""

    kind: str
    name: str
    look: Callable[[bool], str] = field(compare=False, repr=False)


def prefetch_needs(word: str, overrides: Sequence[str], remote_code: bool) -> list[Need]:
    """Return what a recipe, a study or an eval needs; `remote_code` is for the tasks of lm-eval."""
    path = recipe_path(word)
    study = study_file(word)
    recipes: list[Recipe] = []
    evals: list[EvalRecipe] = []
    if study is not None:
        loaded = load_study(study, overrides)
        recipes += [arm.recipe for arm in loaded.arms]
        evals += loaded.evals
    elif path.is_file() and read(path).kind == "eval":
        evals.append(load_eval(path, overrides))
    else:
        recipes.append(load_recipe(word, overrides))
    needs = [_model("model", recipe.model) for recipe in recipes]
    for recipe in recipes:
        needs += map(_rows, listed_sources(recipe.data))
    for evaluation in evals:
        needs += _of_eval(evaluation, remote_code)
    return list(dict.fromkeys(needs))


def _model(kind: str, section: ModelSection) -> Need:
    name = section.name_or_path
    if section.revision:
        name += f" at {section.revision}"
    return Need(kind, name, lambda fetch: model_files(section, fetch))


def _rows(source: SourcePart) -> Need:
    name = shown_path(Path(source.source))
    return Need("data", name, lambda fetch: f"{len(load_rows(source)):,} rows")


def _of_eval(recipe: EvalRecipe, remote_code: bool) -> Iterator[Need]:
    data = recipe.data
    judge = recipe.judge

    # without `fetch` a package that is absent is refused: to look for its files would fetch it
    def prompts(fetch: bool) -> str:
        if not fetch and not PROMETHEUS.are_here():
            raise EnvironmentFault("not on this machine")
        texts = [published_template(kind) for kind in ("relative", "absolute")]
        return f"{len(texts)} prompts"

    def tasks(fetch: bool) -> str:
        # numpy and scipy, which `recipes launch --help` does without
        from recipes_lib.evals.suites.lm_eval import load_tasks

        return f"{load_tasks(recipe, remote_code):,} items"

    def questions(fetch: bool) -> str:
        uses_package = MT_BENCH_PACKAGE in (data.questions, data.references)
        if uses_package and not fetch and not MT_BENCH.are_here():
            raise EnvironmentFault("not on this machine")
        return f"{len(load_questions(recipe).questions)} questions"

    # weights that a job loads, itself or by a server beside it; a name without a slash is one that
    # a server goes by
    if judge and (not judge.is_served or (judge.served_here and "/" in judge.model)):
        yield _model("judge", ModelSection(name_or_path=judge.model, revision=judge.revision))
    if judge and PROMETHEUS_PACKAGE in (judge.relative_prompt, judge.absolute_prompt):
        yield Need("prompts", PROMETHEUS_PACKAGE, prompts)
    if recipe.suite.name == "lm_eval":
        yield Need("tasks", ", ".join(recipe.suite.tasks or []), tasks)
    elif recipe.suite.name not in ROW_SUITES:  # rows of the runs' own data, or a file
        yield Need("questions", str(data.questions), questions)


def model_files(section: ModelSection, fetch: bool) -> str:
    """Return what a model's files on this machine are; raise where they are missing or cut."""
    name = section.name_or_path
    local_folder(bare_recipe(section))  # refuses a path at which no model is
    if fetch and name == MODEL:
        materialise()
    elif fetch and not Path(name).is_dir():
        from huggingface_hub import is_offline_mode, snapshot_download

        if is_offline_mode():
            raise explain_load_failure(section, ConnectionError())
        try:
            snapshot_download(name, revision=section.revision, allow_patterns=_FILES)
        except Exception as error:  # the Hub client has many exception types
            raise explain_load_failure(section, error) from None
    folder = local_folder(bare_recipe(section))
    if folder is None or object_or_none(folder / "config.json") is None:
        raise EnvironmentFault("not on this machine")
    faults = list(weight_faults(folder))
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        faults.append(f"no tokenizer files in {folder}")
    if faults:
        hint = "remove a damaged file first, then fetch it again: recipes prefetch"
        raise EnvironmentFault(f"'{name}': {faults[0]}", hint)
    return "whole"
