"""The verbs about recipes: new, show, explain, migrate and check. None imports torch."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic.json_schema import JsonSchemaValue

from recipes_lib.commands import RecipeWord
from recipes_lib.config.documents import (
    Document,
    did_you_mean,
    no_such_file,
    read,
    value_text,
    wrong_kind,
)
from recipes_lib.config.launch import (
    DEFAULT_PORT,
    AccelerateConfig,
    Launch,
    accelerate_rules,
    plan_launch,
)
from recipes_lib.config.new import Method, migrate, new_recipe, schema_line
from recipes_lib.config.parsing import judge
from recipes_lib.config.recipe import Recipe, check_recipe, load_recipe, recipe_keys, recipe_of
from recipes_lib.config.upstream import CLASSES, TRAIN_DEFAULTS
from recipes_lib.core.errors import DataError, ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name, recipe_path, shown_path
from recipes_lib.core.terminal import aligned, count, next_step, say
from recipes_lib.data.rows import check_rows, formats_of
from recipes_lib.training.resume_guard import differences, flatten

Findings = tuple[list[RecipesError], list[RecipeError]]  # errors; warnings and notes

# ---- new ----


def run_new(
    name: Annotated[str, "name of the recipe and of its run"],
    *,
    from_: Annotated[str, "the recipe to start from, for example quickstart/lora-r8"],
    model: Annotated[str | None, "another base model: a Hub id or a folder"] = None,
    data: Annotated[Path | None, "your rows: jsonl, json, csv, parquet, ..., or a folder"] = None,
    method: Annotated[Method | None, "what to train"] = None,
    output: Annotated[Path | None, "default: NAME.yaml, in ./recipes if there is one"] = None,
) -> int:
    """Write the recipe and print it; nothing is left where the rows cannot be read."""
    check_run_name(name)
    folder = Path("recipes") if Path("recipes").is_dir() else Path()
    target = output or folder / f"{name}.yaml"
    file = shown_path(target)
    if target.exists():
        raise RecipeError("exists already", "write elsewhere: --output OTHER.yaml", file=file)
    rows = (data, formats_of(data)) if data else None
    text = new_recipe(name, target, load_recipe(from_), model=model, rows=rows, method=method)
    write_text(target, text)
    try:
        recipe = load_recipe(target, ["run.global_batch_size=null"])  # it can be lowered
        for error in check_rows(recipe) if rows else ():
            raise error
    except RecipesError:
        target.unlink()
        raise
    say(f"wrote {file}:\n{text.rstrip()}")
    return next_step("recipes", "check", file)


# ---- migrate ----


def run_migrate(
    config: Annotated[Path, "a flat TRL YAML: trl sft --config, alignment handbook, open-r1"],
    *,
    output: Annotated[Path, "the recipe to write"],
    force: Annotated[bool, "replace OUTPUT if it exists"] = False,
) -> int:
    """Write the recipe and list every change."""
    if output.exists() and not force:
        hint = "add --force to replace it, or choose another --output"
        raise RecipeError("exists already", hint, file=output)
    text, changes = migrate(config, schema_line(output))
    write_text(output, text)
    say("\n".join(changes))
    say(f"{output}: {len(changes)} changes")
    return next_step("recipes", "check", "--full", output)


# ---- show ----


def run_show(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    diff: Annotated[str | None, "print only what differs from another recipe"] = None,
) -> int:
    """Print the recipe as YAML with the place of every value: the output is a recipe again."""
    loaded = load_recipe(recipe, overrides)
    if diff is not None:
        say("\n".join(_differences(loaded, load_recipe(diff))))
        return ExitCode.DONE
    # what somebody wrote and the project's defaults; paths are absolute, so it is a recipe anywhere
    values, file = loaded.document.values, shown_path(loaded.path)
    named = {**values.get("run", {}), "name": loaded.name}
    lines = list(_lines(loaded, {**values, "train": loaded.train, "run": named}))
    say(f"# {loaded.name}: {file}")
    say(f"#   {launch_line(plan_launch(loaded.launch), file, overrides)}")
    width = max((len(text) for text, comment in lines if comment and len(text) < 60), default=0)
    for text, comment in lines:
        say(f"{text:<{width}}  # {comment}" if comment else text)
    say(f"# next: {shlex.join(['recipes', 'data', file, *overrides, '--show', '3'])}")
    return ExitCode.DONE


def launch_line(launch: Launch, file: str, overrides: Sequence[str]) -> str:
    """Return the plain command that trains a recipe; of several machines, machine 0's."""
    if launch.machines > 1:
        port = launch.config.main_process_port or DEFAULT_PORT
        launch = replace(launch, rank=0, address="HOST_OF_RANK_0", port=port)
    script = ["-m", "recipes_lib.train", file, *overrides]
    return shlex.join(["accelerate", "launch", *launch.launcher_words(), *script])


def _differences(a: Recipe, b: Recipe) -> list[str]:
    """Return the table of the resolved values that differ, with the place of each."""
    left, right = flatten(a.to_dict()), flatten(b.to_dict())
    if a.run.name is None and b.run.name is None:  # derived names differ by nature
        left["run.name"] = right["run.name"]
    rows = [["", shown_path(a.path), shown_path(b.path)]]
    for key, values in differences(left, right).items():
        cells = [
            "-" if value is None else f"{value_text(value)}  ({recipe.origin_of(key)})"
            for recipe, value in zip((a, b), values, strict=True)
        ]
        rows.append([key, *cells])
    return aligned(rows) if len(rows) > 1 else ["no difference"]


def _lines(
    recipe: Recipe, values: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Yield each line of YAML and the place of its value."""
    for key, value in values.items():
        text = f"{'  ' * len(above)}{key}:"
        if isinstance(value, dict) and value:
            yield text, ""
            yield from _lines(recipe, value, (*above, key))
        else:
            yield f"{text} {value_text(value)}", str(recipe.origin_of(".".join((*above, key))))


# ---- explain ----


def run_explain(
    key: Annotated[str, "train.learning_rate, a section such as train, or nothing"] = "",
) -> int:
    """Print what is known about a key, a section's keys, or the sections."""
    keys = recipe_keys()
    name = _full_name(key) if key else ""
    inner = {key: schema for key, schema in keys.items() if key.rpartition(".")[0] == name}
    if not inner:
        schema, (section, _, word) = keys[name], name.partition(".")
        source = f" ({CLASSES[section]})" if section in CLASSES else ""
        if section == "train" and word in TRAIN_DEFAULTS:
            source = " (project default, not TRL's)"
        say(f"{name}: {_type_text(schema)}")
        if source or "default" in schema:
            say(f"  default {value_text(schema.get('default'))}{source}")
        say(f"  {schema.get('description') or 'no documentation upstream'}")
        return ExitCode.DONE
    if name:
        say(f"{name}: {keys[name].get('description', '')}")
    rows = []
    for key, schema in inner.items():
        text = textwrap.shorten(schema.get("description") or "", 80, placeholder=" ...")
        rows.append([f"  {key.removeprefix(f'{name}.')}", text])
    say("\n".join(aligned(rows)))
    return next_step("recipes", "explain", next(iter(inner)) if name else "train")


def _full_name(word: str) -> str:
    """Return the dotted name of a key, completed if only one section has it."""
    keys, plain = recipe_keys(), word.replace("-", "_")
    ending = [key for key in keys if key == plain or key.endswith(f".{plain}")]
    if plain in keys or len(ending) == 1:
        return plain if plain in keys else ending[0]
    raise RecipeError(f"unknown key '{word}'", *did_you_mean(plain, keys))


def _type_text(schema: JsonSchemaValue) -> str:
    """Return what a value must be: `integer >= 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type_text, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words = [f"{sign} {schema[word]:g}" for word, sign in bounds.items() if word in schema]
    kind = {"array": "list", "object": "mapping", "string": "text"}.get(schema.get("type", ""))
    return " ".join([kind or schema.get("type", "any value"), *words])


# ---- check ----


def run_check(
    paths: Annotated[list[str], "YAML files, names of recipes, or folders with YAML files"],
    *,
    full: Annotated[bool, "also build the objects of TRL and PEFT"] = False,
) -> int:
    """Check every file; print warnings and notes, then all errors."""
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    checked = [check_file(file, full) for file in files]
    # what stands in a base is said once
    errors = {str(error): error for wrong, _ in checked for error in wrong}
    notes = {
        note.what if note.what.startswith("note:") else str(note): note
        for _, noted in checked
        for note in noted
    }
    by_place = sorted(errors.values(), key=lambda error: (str(error.file), error.line or 0))
    for message in (*notes.values(), *by_place):
        print_error(message)
    num_files = count(len(files), "file")
    if errors:
        broken = sum(bool(wrong) for wrong, _ in checked)
        print_error(f"{count(len(errors), 'error')} in {broken} of {num_files}")
        of_data = all(error.exit_code == ExitCode.DATA for error in by_place)
        return ExitCode.DATA if of_data else ExitCode.USAGE
    say(f"{num_files} ok")
    verbs = {"recipe": ("data",), "study": ("study", "plan")}
    for file in files:
        document = read(file)
        if document.kind in verbs and not document.is_base:
            return next_step("recipes", *verbs[document.kind], shown_path(file))
    return next_step("recipes ls")


def check_file(path: Path, full: bool) -> Findings:
    """Return what is wrong with a YAML file of any kind, and notes; `full` asks upstream too."""
    try:
        document = read(path)
        kind = document.kind
        if kind == "recipe":
            return _check_recipe(document, full)
        if kind == "study":
            return _check_study(path, full)
        if kind == "accelerate":
            return [*judge(AccelerateConfig, document, accelerate_rules)[1]], []
        if kind == "profile":
            from recipes_lib.slurm.profile import load_profile

            load_profile(str(path))
        elif kind == "judge":
            from recipes_lib.evals.recipe import load_judge_file

            load_judge_file(path)
        elif kind == "eval":
            from recipes_lib.evals.questions import local_questions
            from recipes_lib.evals.recipe import load_eval

            local_questions(load_eval(path))
        elif kind != "lm_eval_task":  # it is seen with the eval recipe that names it
            raise wrong_kind(document, "recipe")
    except RecipeError as error:
        return [*error.errors], []
    except DataError as error:
        return [error], []
    return [], []


def _check_recipe(document: Document, full: bool) -> Findings:
    file, wrong = check_recipe(document)
    if file is None or document.is_base:
        return [*wrong], []
    try:
        recipe = recipe_of(file, document)
    except RecipeError as error:  # a run's name
        return [*wrong, error], []
    notes: list[RecipeError] = []
    errors: list[RecipesError] = [*wrong]
    folder = Path(recipe.model.name_or_path)
    if not wrong and (full or folder.is_dir()):
        from recipes_lib.config.preflight import check_model_files, check_upstream

        errors += check_upstream(recipe, notes=notes) if full else check_model_files(recipe, folder)
    if wrong or not errors:
        errors += check_rows(recipe)
    return errors, notes


def _check_study(path: Path, full: bool) -> Findings:
    from recipes_lib.config.preflight import check_upstream
    from recipes_lib.study.config import load_study
    from recipes_lib.study.run import unmet

    study, warnings = load_study(path), list[RecipeError]()
    errors = [*unmet(study, study.arms)]
    for arm in study.arms if full else ():
        for variant in (arm, *arm.candidates):
            errors += check_upstream(variant.recipe, notes=warnings)
    return errors, warnings


def _files(path: Path) -> Iterable[Path]:
    """Return the YAML files of a path; hidden folders and runs are left out."""
    if not path.is_dir():
        path = recipe_path(path)
        if not os.path.lexists(path):  # a link that leads nowhere is there
            raise no_such_file(path)
        return [path]
    files = [
        file
        for file in sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
        if not re.search(r"(^|/)(\..*|runs)/", str(file.relative_to(path)))
    ]
    if not files:
        raise RecipeError("holds no YAML file", file=path)
    return files
