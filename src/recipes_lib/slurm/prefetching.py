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
from recipes_lib.evals.prompts import PROMETHEUS_PACKAGE, prometheus_is_here, published_template
from recipes_lib.evals.questions import MT_BENCH_PACKAGE, load_questions, mt_bench_is_here
from recipes_lib.evals.recipe import EvalRecipe, load_eval
from recipes_lib.models.packaged import is_packaged, materialise, packaged_folder
from recipes_lib.study.config import load_study, study_file
from recipes_lib.weights.load import explain_load_failure

_FETCH_IT = "where there is a network: recipes prefetch"
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]


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
    needs = []
    for recipe in recipes:
        needs += [_model(recipe.model), *map(_data, listed_sources(recipe.data))]
    for suite in evals:
        needs += _of_eval(suite, remote_code)
    return list(dict.fromkeys(needs))


def _data(source: Source) -> Need:
    def check() -> str:
        rows = 0
        for table in load_tables(source):
            for line, row in table.numbered:
                if isinstance(row, BadRow):
                    raise DataError(row.what, file=table.file, line=line)
                rows += 1
        return f"{rows:,} rows"

    return _need("data", shown_path(Path(source.source)), check)


def _model(section: ModelSection, kind: str = "model") -> Need:
    name = section.name_or_path + (f" at {section.revision}" if section.revision else "")
    return Need(kind, name, lambda: fetch_model(section), lambda: check_model(section))


def _of_eval(recipe: EvalRecipe, remote_code: bool) -> Iterator[Need]:
    def tasks() -> str:
        # numpy and scipy, which `recipes launch --help` does without
        from recipes_lib.evals.suites.lm_eval import load_tasks

        return f"{load_tasks(recipe, remote_code):,} items"

    def questions() -> str:
        return f"{len(load_questions(recipe).questions)} questions"

    def prompts() -> str:
        return f"{len([published_template(kind) for kind in ('relative', 'absolute')])} prompts"

    yield from (_model(judge, "judge") for judge in judge_weights([recipe]))
    judge, name = recipe.judge.judge if recipe.judge else None, str(recipe.data.questions)
    if judge and PROMETHEUS_PACKAGE in (judge.relative_prompt, judge.absolute_prompt):
        yield _need("prompts", PROMETHEUS_PACKAGE, prompts, prometheus_is_here)
    if recipe.suite.name == "lm_eval":
        yield _need("tasks", ", ".join(recipe.suite.tasks or []), tasks)
    elif recipe.suite.name != "heldout_loss":  # rows of the runs' own data, or a file
        packaged = MT_BENCH_PACKAGE in (recipe.data.questions, recipe.data.references)
        yield _need("questions", name, questions, mt_bench_is_here if packaged else None)


def _need(
    kind: str, name: str, look: Callable[[], str], is_here: Callable[[], bool] | None = None
) -> Need:
    """Return what is fetched by looking at it; a check asks first whether a wheel brought it, since
    looking would fetch that.
    """

    def check() -> str:
        if is_here and not is_here():
            raise EnvironmentFault(f"{name} is not on this machine", _FETCH_IT)
        return look()

    return Need(kind, name, look, check)


def judge_weights(evals: Iterable[EvalRecipe]) -> list[ModelSection]:
    """Return the judges of evals as models, where a job needs their weights: by itself, or by the
    server beside it.
    """
    judges = [recipe.judge.judge for recipe in evals if recipe.judge]
    return [
        ModelSection(name_or_path=judge.model, revision=judge.revision)
        for judge in judges
        # a name without a slash is one that a server goes by
        if judge.engine == "transformers" or (judge.served_here and "/" in judge.model)
    ]


def fetch_model(section: ModelSection) -> None:
    """Fetch a model's files into the cache, saying how much it is.

    Raises:
        EnvironmentFault: gated, no such revision, no such folder, or no network.
    """
    name = section.name_or_path
    if is_packaged(name):
        materialise()
    elif _folder_of(section) is None:
        if offline_by_environment() or not hub_answers():
            raise explain_load_failure(section, ConnectionError())
        from huggingface_hub import HfApi, snapshot_download

        try:
            known = HfApi().model_info(name, revision=section.revision, files_metadata=True)
            weights = [f for f in known.siblings or [] if f.rfilename.endswith(".safetensors")]
            size = sum(file.size or 0 for file in weights) / 2**30
            say(f"fetching {name} ({size:.1f} GiB, without what is here already) ...")
            snapshot_download(name, revision=section.revision, allow_patterns=_FILES)
        except Exception as error:  # the Hub client has many exception types
            raise explain_load_failure(section, error) from None


def check_model(section: ModelSection) -> str:
    """Return what a model's files on this machine are, once they are whole.

    Raises:
        EnvironmentFault: files are missing or cut.
    """
    name, again = section.name_or_path, "fetch it again: recipes prefetch"
    folder = packaged_folder() if is_packaged(name) else _folder_of(section)
    if folder is None and not is_packaged(name):
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json", revision=section.revision)
        folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not (folder / "config.json").is_file():
        raise EnvironmentFault(f"'{name}' is not on this machine", _FETCH_IT)
    shards = sorted(folder.glob("*.safetensors"))
    parts = {
        "readable config.json": object_or_none(folder / "config.json") is not None,
        "tokenizer files": any((folder / file).is_file() for file in TOKENIZER_FILES),
    }
    for what, is_there in parts.items():
        if not is_there:
            raise EnvironmentFault(f"'{name}' has no {what} in {folder}", again)
    for fault in weight_faults(folder):
        hint = f"remove a damaged file first, then {again}"
        raise EnvironmentFault(f"'{name}': {fault}", hint)
    size = sum(shard.stat().st_size for shard in shards) / 2**30
    return f"{len(shards)} weight file{'' if len(shards) == 1 else 's'}, {size:.2f} GiB, whole"


def _folder_of(section: ModelSection) -> Path | None:
    """Return the folder of this machine that a model's name is; None for a Hub id.

    Raises:
        EnvironmentFault: it reads like a folder, and there is none.
    """
    name = section.name_or_path
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(("/", "./", "../", "~")):
        what = f"there is no model folder '{name}'"
        raise EnvironmentFault(what, "correct model.name_or_path, or copy the model there")
    return None


def missing_models(sections: Iterable[ModelSection]) -> list[str]:
    """Return the names of models that are not whole on this machine."""
    missing = []
    for section in sections:
        try:
            check_model(section)
        except EnvironmentFault:
            missing.append(section.name_or_path)
    return list(dict.fromkeys(missing))
