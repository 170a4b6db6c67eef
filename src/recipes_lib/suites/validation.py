"""Checking eval recipes: structure, types, choices, and the combinations a schema cannot judge. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.errors import RecipeError, RecipeErrors
from recipes_lib.judging.judge_file import is_address, load_judge_file
from recipes_lib.judging.published_prompts import PACKAGE
from recipes_lib.recipe.credentials import find_credentials
from recipes_lib.recipe.loader import COMMAND_LINE, Document
from recipes_lib.recipe.project import shown_path
from recipes_lib.recipe.suggestions import did_you_mean
from recipes_lib.recipe.validation import strict_validator, wrong_value
from recipes_lib.recipe.vocabulary import load_schema
from recipes_lib.recipe.yaml_source import KeyPath
from recipes_lib.suites.task_code import code_in
from recipes_lib.suites.task_names import unknown_tasks

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

_ONLY_LM_EVAL = ("tasks", "num_fewshot", "limit", "apply_chat_template", "system_instruction", "gen_kwargs", "options")


def check_eval(document: Document, full: bool = False) -> list[RecipeError]:
    """The check of eval recipes that `recipes check` runs: the file, and the judge file and questions it names."""
    del full
    found: dict[KeyPath, RecipeError] = dict(find_credentials(document))
    for error in _validator("eval").iter_errors(document.values):
        for path, translated in translate(document, error):
            found.setdefault(path, translated)
    return list(found.values()) or list(_combinations(document))


def check_judge(document: Document, full: bool = False) -> list[RecipeError]:
    """The check of judge files that `recipes check` runs: the file, and the prompts and rubrics it names."""
    del full
    errors: list[RecipeError] = []
    try:
        judge = load_judge_file(document.path)
        for kind, name in (("relative", judge.judge.relative_prompt), ("absolute", judge.judge.absolute_prompt)):
            if name != PACKAGE:  # a check fetches nothing
                judge.template(kind)
        for reference in (False, True):
            judge.rubric(reference)
    except RecipeErrors as several:
        errors += several.errors
    except RecipeError as error:
        errors.append(error)
    return errors


def check_task(document: Document, full: bool = False) -> list[RecipeError]:
    """The check of lm-eval's task files: lm-eval reads them, we only see that the file names its task and its data."""
    del full
    return [
        document.error((key,), f"{key} is missing", "a task of lm-eval needs it")
        for key in ("task", "dataset_path")
        if key not in document.values
    ]


def folder_of(document: Document, path: KeyPath) -> Path:
    """Return the folder a relative path at `path` is meant from: that of the file that wrote it, or the working directory."""
    origin = document.origins.get(path)
    if origin is None:
        return document.path.parent
    return Path.cwd() if origin.file == COMMAND_LINE else Path(origin.file).parent


def _combinations(document: Document) -> Iterator[RecipeError]:
    """Yield what is wrong between the keys of an eval recipe."""
    values = document.values
    suite, data, judge = values["suite"], values.get("data", {}), values.get("judge", {})
    if suite["name"] == "lm_eval":
        if not suite.get("tasks"):
            yield document.error(("suite",), "suite.tasks is missing", "name the tasks, for example tasks: [arc_easy]")
        folder = folder_of(document, ("data", "include_path")) / data["include_path"] if data.get("include_path") else None
        for task, hints in unknown_tasks(suite.get("tasks") or (), folder).items():
            yield document.error(("suite", "tasks"), f"lm-eval has no task '{task}'", *hints)
    else:
        for key in _ONLY_LM_EVAL:
            if suite.get(key):
                hint = "use data.max_questions" if key == "limit" else "remove it"
                yield document.error(("suite", key), f"suite.{key} is an option of lm_eval, not of {suite['name']}", hint)
        if not data.get("questions"):
            yield document.error(
                ("data",), f"data.questions is missing; {suite['name']} needs questions", "what it is: recipes explain eval.data.questions"
            )
        if not (judge.get("file") or judge.get("model")):
            yield document.error(
                ("judge",), "judge.file is missing", "name a file in evals/judges, for example judges/prometheus-7b-v2.yaml"
            )
    for path in (("data", "questions"), ("data", "references"), ("data", "include_path"), ("judge", "file")):
        name = values.get(path[0], {}).get(path[1])
        looks_like_path = name and (
            path[0] == "judge" or path[1] == "include_path" or (Path(name).suffix in (".json", ".jsonl", ".csv") and ":" not in name)
        )
        if looks_like_path and not (folder_of(document, path) / name).exists():
            yield document.error(path, f"{_dotted(path)}: no such file: {shown_path(folder_of(document, path) / name)}")
    file = folder_of(document, ("judge", "file")) / judge["file"] if judge.get("file") else None
    if file and file.is_file():
        try:
            load_judge_file(file)
        except RecipeError as error:
            yield from error.errors if isinstance(error, RecipeErrors) else [error]
    generation = values.get("generation", {})
    for section in ("generation", "judge"):
        if (url := values.get(section, {}).get("base_url")) and not is_address(url):
            what = f"{section}.base_url: an address such as http://127.0.0.1:8000/v1, not {url!r}"
            yield document.error((section, "base_url"), what)
    if suite["name"] == "lm_eval" and not generation.get("trust_remote_code"):
        name = data.get("include_path")
        yield from code_in(document, folder_of(document, ("data", "include_path")) / name if name else None)
    if generation.get("engine") == "openai" and not generation.get("base_url"):
        yield document.error(("generation", "engine"), "generation.engine openai needs base_url")


@lru_cache(maxsize=4)
def _validator(kind: str) -> Draft202012Validator:
    """Return the validator of a kind."""
    return strict_validator(load_schema(kind))


def translate(document: Document, error: ValidationError) -> list[tuple[KeyPath, RecipeError]]:
    """Turn one error of jsonschema into ours, each with its key path."""
    path: KeyPath = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", {}))
        return [((*path, key), _unknown(document, (*path, key), known)) for key in error.instance if key not in known]
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return [((*path, key), document.error((*path, key), f"{_dotted((*path, key))} is missing")) for key in missing]
    return [(path, wrong_value(document, path, error))]


def _unknown(document: Document, path: KeyPath, known: list[str]) -> RecipeError:
    """Return the error for a key that does not exist here."""
    prefix = f"{_dotted(path[:-1])}." if len(path) > 1 else ""
    what = f"unknown key '{_dotted(path)}'" if len(path) > 1 else f"unknown section '{path[0]}'"
    near = did_you_mean(str(path[-1]).replace("-", "_"), known, prefix)
    return document.error(path, what, *near, f"keys here: {', '.join(known)}")


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
