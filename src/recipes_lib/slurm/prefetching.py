"""What a recipe, a study or an eval needs from elsewhere: fetched on the login node, and found
again without a network.

Nothing is loaded into memory but tokenizers and rows: weights are checked by their headers and
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes_lib.config.documents import read
from recipes_lib.config.preflight import TOKENIZER_FILES, weight_faults
from recipes_lib.config.recipe import load_recipe
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import DataError, EnvironmentFault
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import recipe_path, shown_path
from recipes_lib.core.terminal import say
from recipes_lib.data.rows import BadRow
from recipes_lib.data.sources import (
    Source,
    hub_answers,
    listed_sources,
    load_tables,
    offline_by_environment,
)
from recipes_lib.evals.prompts import (
    PROMETHEUS_PACKAGE,
    prometheus_is_here,
    published_template,
)
from recipes_lib.evals.questions import MT_BENCH_PACKAGE, load_questions, mt_bench_is_here
from recipes_lib.evals.recipe import EvalRecipe, load_eval
from recipes_lib.models.packaged import is_packaged, materialise, packaged_folder
from recipes_lib.study.config import load_study, study_file
from recipes_lib.weights.load import explain_load_failure

_FETCH_IT = "where there is a network: recipes prefetch"
WEIGHT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]


@dataclass(frozen=True)
class Need:
    """One thing that is needed: `fetch` gets it where a network is, `check` finds it without one
    and says what it found.
    """

    kind: str
    name: str
    fetch: Callable[[], object] = field(compare=False, repr=False)
    check: Callable[[], str] = field(compare=False, repr=False)


def prefetch_needs(
    word: str, overrides: Sequence[str] = (), remote_code: bool = False
) -> list[Need]:
    """Return what a recipe, a study or an eval recipe needs, each once.

    Args:
        remote_code: whether the command line allowed code of lm-eval's tasks, which are built to
            find their data.

    Raises:
        RecipeErrors: what is wrong with the file.
    """
    if file := study_file(word):
        study = load_study(file, overrides)
        recipes = [arm.recipe for arm in study.arms]
        evals: Sequence[EvalRecipe] = study.evals
    elif (path := recipe_path(word)).is_file() and read(path).kind == "eval":
        recipes, evals = [], [load_eval(path, overrides)]
    else:
        recipes, evals = [load_recipe(word, overrides)], []
    found = []
    for recipe in recipes:
        found += [_model(recipe.model), *map(_data, listed_sources(recipe.data))]
    for one in evals:
        found += _of_eval(one, remote_code)
    return list(dict.fromkeys(found))


def _data(source: Source) -> Need:
    def check() -> str:
        rows = 0
        for table in load_tables(source):
            for line, row in table.numbered:
                if isinstance(row, BadRow):
                    hints = filter(None, [row.hint])
                    raise DataError(row.what, *hints, file=table.file, line=line)
                rows += 1
        return f"{rows:,} rows"

    return _need("data", shown_path(Path(source.source)), check)


def _model(section: ModelSection, kind: str = "model") -> Need:
    name = section.name_or_path + (f" at {section.revision}" if section.revision else "")
    return Need(kind, name, lambda: fetch_model(section), lambda: check_model(section))


def _of_eval(recipe: EvalRecipe, remote_code: bool) -> Iterator[Need]:
    for judge in judge_model(recipe):
        yield _model(judge, "judge")

    def prompts() -> str:
        return f"{len([published_template(kind) for kind in ('relative', 'absolute')])} prompts"

    def tasks() -> str:
        # numpy and scipy, which `recipes launch --help` does without
        from recipes_lib.evals.suites.lm_eval import load_tasks

        return f"{load_tasks(recipe, remote_code):,} items"

    def questions() -> str:
        return f"{len(load_questions(recipe).questions)} questions"

    judging = recipe.judge.judge if recipe.judge else None
    if judging and PROMETHEUS_PACKAGE in (judging.relative_prompt, judging.absolute_prompt):
        yield _need("prompts", PROMETHEUS_PACKAGE, prompts, prometheus_is_here)
    name = str(recipe.data.questions)
    if recipe.suite.name == "lm_eval":
        yield _need("tasks", ", ".join(recipe.suite.tasks or []), tasks)
    elif MT_BENCH_PACKAGE in (recipe.data.questions, recipe.data.references):
        yield _need("questions", name, questions, mt_bench_is_here)
    elif recipe.suite.name != "heldout_loss":  # rows of the runs' own data, or a file
        yield _need("questions", name, questions)


def _need(
    kind: str, name: str, look: Callable[[], str], is_here: Callable[[], bool] = lambda: True
) -> Need:
    """Return what is fetched by looking at it; a check asks first whether a wheel brought it, since
    looking would fetch that.
    """

    def check() -> str:
        if not is_here():
            raise EnvironmentFault(f"{name} is not on this machine", _FETCH_IT)
        return look()

    return Need(kind, name, look, check)


def judge_model(recipe: EvalRecipe) -> list[ModelSection]:
    """Return the judge of an eval as a model, where a job needs its weights: by itself, or by the
    server beside it.
    """
    judge = recipe.judge.judge if recipe.judge else None
    if judge is None:
        return []
    # a name without a slash is one that a server goes by
    here = judge.engine == "transformers" or (judge.served_here and "/" in judge.model)
    return [ModelSection(name_or_path=judge.model, revision=judge.revision)] if here else []


def fetch_model(section: ModelSection) -> None:
    """Fetch a model's files into the cache, saying how much it is.

    Raises:
        EnvironmentFault: gated, no such revision, no such folder, or no network.
    """
    name = section.name_or_path
    if is_packaged(name):
        materialise()
        return
    if _is_folder(name):
        return
    if offline_by_environment() or not hub_answers():
        raise explain_load_failure(section, ConnectionError())
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = (
            HfApi().model_info(name, revision=section.revision, files_metadata=True).siblings or []
        )
        size = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
        say(
            f"fetching {name} ({size / 2**30:.1f} GiB of weights; what is here already is not"
            " fetched again) ..."
        )
        snapshot_download(name, revision=section.revision, allow_patterns=WEIGHT_FILES)
    except Exception as error:  # the Hub client has many exception types; each becomes one line
        raise explain_load_failure(section, error) from None


def check_model(section: ModelSection) -> str:
    """Return what a model's files on this machine are, once they are whole.

    Raises:
        EnvironmentFault: files are missing or cut.
    """
    name, again = section.name_or_path, "fetch it again: recipes prefetch"
    if is_packaged(name):
        folder = packaged_folder()
    elif _is_folder(name):
        folder = Path(name)
    else:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json", revision=section.revision)
        folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not (folder / "config.json").is_file():
        raise EnvironmentFault(f"'{name}' is not on this machine", _FETCH_IT)
    shards = sorted(folder.glob("*.safetensors"))
    tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    lacks = {
        "readable config.json": object_or_none(folder / "config.json") is not None,
        "tokenizer files": tokenizer,
    }
    for what, is_there in lacks.items():
        if not is_there:
            raise EnvironmentFault(f"'{name}' has no {what} in {folder}", again)
    for fault in weight_faults(folder):
        hint = f"remove a damaged file first, then {again}"
        raise EnvironmentFault(f"'{name}': {fault}", hint)
    size = sum(shard.stat().st_size for shard in shards) / 2**30
    return f"{len(shards)} weight file{'' if len(shards) == 1 else 's'}, {size:.2f} GiB, whole"


def _is_folder(name: str) -> bool:
    """Whether a model's name is a folder of this machine, and no Hub id.

    Raises:
        EnvironmentFault: it reads like a folder, and there is none.
    """
    if Path(name).is_dir():
        return True
    if name.startswith(("/", "./", "../", "~")):
        raise EnvironmentFault(
            f"there is no model folder '{name}'",
            "correct model.name_or_path, or copy the model there",
        )
    return False


def missing_models(sections: Iterable[ModelSection]) -> list[str]:
    """Return the names of models that are not whole on this machine."""
    missing: dict[str, None] = {}
    for section in sections:
        try:
            check_model(section)
        except EnvironmentFault:
            missing[section.name_or_path] = None
    return list(missing)
