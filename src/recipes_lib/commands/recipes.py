"""The verbs about recipes: new, show, explain and migrate. None imports torch."""

import functools
import json
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic.json_schema import JsonSchemaValue

from recipes_lib.commands import RecipeWord
from recipes_lib.config.documents import SHORT_NAMES, did_you_mean, read, read_words, value_text
from recipes_lib.config.fitting import fit_to_rows
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.migrate import migrate
from recipes_lib.config.new import Method, chosen_keys, copy_of, new_recipe, schema_line
from recipes_lib.config.recipe import (
    Recipe,
    RecipeFile,
    Stage,
    all_keys,
    keys_of,
    load_recipe,
    preference_file,
)
from recipes_lib.config.upstream_sections import (
    CLASSES,
    PREFERENCE_CLASS,
    TRAIN_DEFAULTS,
    LoraSection,
    TrainSection,
    preference_section,
)
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError
from recipes_lib.core.files import write_text
from recipes_lib.core.project import check_run_name, recipe_path, shown_path
from recipes_lib.core.terminal import aligned, next_step, say
from recipes_lib.data.errors import BadRows
from recipes_lib.data.reading import check_rows, first_local_row, formats_of, read_data
from recipes_lib.training.resume_guard import differences, flatten

# Kind of a file that `new` copies whole -> the folder where it is looked for by its name.
_COPIED_TO = {"profile": "launch/profiles", "accelerate": "accelerate_configs"}


def run_new(
    name: Annotated[str, "name of the recipe and of its run"],
    overrides: Sequence[str],
    *,
    from_: Annotated[str, "the recipe to start from, for example quickstart/lora-r8"],
    model: Annotated[str | None, "another base model: a Hub id or a folder"] = None,
    data: Annotated[Path | None, "your rows: jsonl, json, csv, parquet, ..., or a folder"] = None,
    method: Annotated[Method | None, "what to train"] = None,
    output: Annotated[Path | None, "default: NAME.yaml, in ./recipes if there is one"] = None,
) -> int:
    """Write the recipe and print it; nothing is left where no row can be read."""
    check_run_name(name)
    kind = read(from_).kind
    folder = "recipes" if Path("recipes").is_dir() else ""
    target = output or Path(_COPIED_TO.get(kind, folder), f"{name}.yaml")
    file = shown_path(target)
    if target.exists():
        raise RecipeError("exists already", "write elsewhere: --output OTHER.yaml", file=file)
    if kind in _COPIED_TO:
        write_text(target, copy_of(recipe_path(from_), target))
        say(f"wrote {file}; {from_} with its comments")
        return next_step("check", file)
    origin = load_recipe(from_, overrides)
    new_text = functools.partial(
        new_recipe, name, target, origin, model=model, method=method, words=overrides
    )
    if data is not None:
        return _new_with_rows(data, target, new_text, overrides, origin.stage)
    text = new_text()
    write_text(target, text)
    say(f"wrote {file}:\n{text.rstrip()}", fold=False)
    return next_step("check", file)


def _new_with_rows(
    data: Path, target: Path, new_text: Callable[..., str], overrides: Sequence[str], stage: Stage
) -> int:
    """Write a recipe for the user's own rows, fitted to their number; name those that are bad."""
    columns: dict[str, str] = {}
    for document in read_words(overrides):
        columns |= document.values.get("data", {}).get("columns") or {}
    formats = formats_of(data, columns, stage)
    new_text = functools.partial(new_text, data=data, formats=formats)
    write_text(target, new_text())
    bad = BadRows()
    try:
        # the origin's batch may be larger than all of the rows
        recipe = load_recipe(target, ["run.global_batch_size=null"])
        reading = read_data(recipe.data, bad, recipe.stage)
        if not reading.rows:
            raise bad.error(reading.num_read)
        longest = max(len(json.dumps(row.fields)) for row in reading.rows)
        chosen = chosen_keys(overrides)
        fitted = fit_to_rows(load_recipe(target), len(reading.rows), longest, chosen)
    except (RecipesError, ModuleNotFoundError):
        target.unlink()
        raise
    text = new_text(fitted=fitted)
    write_text(target, text)
    file = shown_path(target)
    say(f"wrote {file}:\n{text.rstrip()}", *fitted.lines, fold=False)
    if bad and recipe.data.on_bad_row == "error":
        raise bad.error(reading.num_read)
    for error in check_rows(load_recipe(target)):
        raise error
    return next_step("check", file)


def run_migrate(
    config: Annotated[
        Path, "a flat TRL YAML: trl sft or dpo --config, alignment handbook, open-r1"
    ],
    *,
    output: Annotated[Path, "the recipe to write"],
    force: Annotated[bool, "replace OUTPUT if it exists"] = False,
) -> int:
    """Write the recipe and list every change."""
    if output.exists() and not force:
        hint = "add --force to replace it, or choose another --output"
        raise RecipeError("exists already", hint, file=output)
    text, changes = migrate(config, output, schema_line(output), first_local_row)
    write_text(output, text)
    say(*changes, f"{output}: {len(changes)} changes")
    return next_step("check", "--full", output)


def run_show(
    recipe: RecipeWord,
    overrides: Sequence[str],
    *,
    diff: Annotated[str | None, "print only what differs from another recipe"] = None,
) -> int:
    """Print the recipe as YAML with the place of every value: the output is a recipe again."""
    loaded = load_recipe(recipe, overrides)
    if diff is not None:
        other = load_recipe(diff)
        old_values = flatten(loaded.to_dict())
        new_values = flatten(other.to_dict())
        if loaded.run.name is None and other.run.name is None:  # derived names differ by nature
            old_values["run.name"] = new_values["run.name"]
        rows = [["", shown_path(loaded.path), shown_path(other.path)]]
        for key, (old, new) in differences(old_values, new_values).items():
            row = [key, _value_with_place(loaded, key, old), _value_with_place(other, key, new)]
            rows.append(row)
        if len(rows) == 1:
            say("no difference")
        else:
            say(*aligned(rows))
        return ExitCode.DONE
    # paths are absolute in the document, so that the output is a recipe in any folder
    values = loaded.document.values | {"train": loaded.train}
    values["run"] = values.get("run", {}) | {"name": loaded.name}
    lines = list(_lines(loaded, values))
    file = shown_path(loaded.path)
    say(f"# {loaded.name}: {file}")
    say(f"#   {plan_launch(loaded.launch).plain_command(file, overrides)}")
    # a longer line does not push the comments of all others to the right
    width = max((len(text) for text, comment in lines if comment and len(text) < 60), default=0)
    for text, comment in lines:
        if comment:
            text = f"{text:<{width}}  # {comment}"
        say(text, fold=False)
    command = shlex.join(["recipes", "data", file, *overrides, "--show", "3"])
    say(f"# next: {command}")
    return ExitCode.DONE


def _value_with_place(recipe: Recipe, key: str, value: object) -> str:
    """Return a value and the file and line that set it; a dash where nothing did."""
    if value is None:
        return "-"
    return f"{value_text(value)}  ({recipe.origin_of(key)})"


def _lines(
    recipe: Recipe, values: Mapping[str, object], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Yield each line of YAML and the place of its value."""
    for key, value in values.items():
        path = above + (key,)
        text = f"{'  ' * len(above)}{key}:"
        if isinstance(value, dict) and value:
            yield text, ""
            yield from _lines(recipe, value, path)
        else:
            yield f"{text} {value_text(value)}", str(recipe.origin_of(".".join(path)))


def run_explain(
    key: Annotated[str, "train.learning_rate, a section such as train, or nothing"] = "",
) -> int:
    """Print what is known about a key, a section's keys, or the sections."""
    from recipes_lib.evals.recipe import EvalRecipe
    from recipes_lib.slurm.profile import Profile
    from recipes_lib.study.config import StudyFile

    keys = all_keys()
    # those of other files stand under their kind: eval.suite.name
    for model in (EvalRecipe, StudyFile, Profile):
        keys[model.kind] = {"description": model.__doc__}
        keys |= keys_of(model, f"{model.kind}.")
    word_typed = key.replace("-", "_").replace(" ", "_")
    name = _full_name(word_typed, keys) if key else ""
    inner = [key for key in keys if key.rpartition(".")[0] == name]
    if inner:
        if name:
            say(f"{name}: {keys[name].get('description', '')}")
        rows = []
        for inner_key in inner:
            text = keys[inner_key].get("description") or ""
            shortened = textwrap.shorten(text, 80, placeholder=" ...")
            rows.append([f"  {inner_key.rpartition('.')[2]}", shortened])
        say(*aligned(rows))
        return next_step("explain", inner[0] if name else "train")
    schema = keys[name]
    section, _, word = name.partition(".")
    source = ""
    if section == "train" and word in TRAIN_DEFAULTS:
        source = " (project default, not TRL's)"
    elif name in keys_of(RecipeFile) and section in CLASSES:
        source = f" ({CLASSES[section]})"
    elif section in CLASSES:
        source = f" ({PREFERENCE_CLASS}, in stage dpo)"
    say(f"{name}: {_type_text(schema)}")
    if source or "default" in schema:
        say(f"  default {value_text(schema.get('default'))}{source}")
    in_dpo = keys_of(preference_file()).get(name, {})
    if section == "train" and not in_dpo:
        say(f"  not in stage dpo: {preference_section().gone[word]}")
    elif section == "train" and in_dpo.get("default") != schema.get("default"):
        say(f"  in stage dpo: default {value_text(in_dpo.get('default'))} ({PREFERENCE_CLASS})")
    text = schema.get("description") or "no documentation upstream"
    say(f"  {' '.join(text.split())}")
    endings = (f".{word_typed}", f"_{word_typed}")
    others = [other for other in keys if other.endswith(endings) and other != name]
    if others:
        say(f"  or did you mean {', '.join(others)}?")
    return next_step("explain", name.rpartition(".")[0] or "train")  # its neighbours


def _full_name(word: str, keys: Mapping[str, JsonSchemaValue]) -> str:
    """Return a key's dotted name, completed if only one section (first, of a recipe) has it."""
    plain = SHORT_NAMES.get(word, word)
    for candidates in (all_keys(), keys):
        if plain in candidates:
            return plain
        ending = [key for key in candidates if key.endswith(f".{plain}")]
        if len(ending) == 1:
            return ending[0]

    hints = did_you_mean(plain, keys)
    containing = [key for key in keys if plain in key][:8]
    if containing:
        hints = [f"keys: {', '.join(containing)}"]
    for section in (LoraSection, preference_section(), TrainSection):
        last = plain.rpartition(".")[2]
        if last in section.gone:
            hints = [section.gone[last]]
    raise RecipeError(f"unknown key '{word}'", *(hints or ["all sections: recipes explain"]))


def _type_text(schema: JsonSchemaValue) -> str:
    """Return what a value must be: `integer >= 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type_text, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    json_type = str(schema.get("type", "any value"))
    words_of_yaml = {"array": "list", "object": "mapping", "string": "text"}
    type_name = words_of_yaml.get(json_type, json_type)
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[word]:g}" for word, sign in signs.items() if word in schema]
    return " ".join([type_name] + bounds)
