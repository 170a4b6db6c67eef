"""The text of a new recipe that extends another, or of a copy of a shipped profile or config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from recipes_lib.config.documents import Values, dotted, read_words, relative_path
from recipes_lib.config.fitting import Fitted
from recipes_lib.config.recipe import DataSection, FiltersSection, Recipe
from recipes_lib.core.project import project_root

Method = Literal["lora", "qlora", "full"]
# What a QLoRA base is quantized with.
FOUR_BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",  # FSDP shards one floating type
}
_NEW_ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Full fine-tuning takes about a tenth of the learning rate that an adapter takes.
_RATE_OF_ADAPTER = 10
# The keys of `data` that say which rows of a source are read, and how its columns are called.
_OF_THE_SOURCE = ("subset", "source_split", "revision", "columns", "max_examples")
_OF_CHAT = ("chat_template", "chat_template_kwargs", "template_date", "system_prompt", "chat_loss")
_SCHEMA_MARK = "# yaml-language-server: $schema="


def new_recipe(
    name: str,
    target: Path,
    origin: Recipe,
    *,
    model: str | None = None,
    data: Path | None = None,
    formats: Sequence[str] = (),
    method: Method | None = None,
    words: Sequence[str] = (),
    fitted: Fitted | None = None,
) -> str:
    """Return the text of a recipe called `name` that extends `origin` and will lie at `target`.

    Args:
        data: the user's own rows, a file or folder. Steps become shares of the training.
        formats: the prompt formats that can read these rows.
        words: `section.key=value`, as the user typed them; `origin` was read with them.
        fitted: what the number of rows changes.
    """
    values: Values = {"model": {}, "quantization": {}, "lora": {}, "data": {}, "train": {}}
    if model is not None:
        _set_model(values, target, origin, model)
    if data is not None:
        values["data"]["source"] = relative_path(target, data)
        _set_rows(values, origin, formats, chosen_keys(words))
    if method is not None:
        _set_method(values, origin, method)
    values["run"] = {"name": name, "tags": []}
    if fitted is not None:
        _write(values, fitted.values, {}, target)
    for document in read_words(words):
        _write(values, document.values, origin.document.values, target)
    written = {key: value for key, value in values.items() if value is None or value}
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    path = origin.path.resolve()
    parent = relative_path(target, path)
    shipped = project_root().resolve() / "recipes"
    if path.is_relative_to(shipped):  # its short name holds wherever the package lies
        parent = path.relative_to(shipped).with_suffix("").as_posix()
    lines = [schema_line(target), f"extends: {parent}", text]
    return "\n".join(line for line in lines if line)


def _set_model(values: Values, target: Path, origin: Recipe, model: str) -> None:
    """Another base: its own chat template and end of turn, and adapters on all of its layers."""
    folder = Path(model).expanduser()
    if folder.resolve() == Path(origin.model.name_or_path).expanduser().resolve():
        return  # the origin's own: its template may be what a base without one needs
    if folder.is_dir():
        model = relative_path(target, folder)
    values["model"]["name_or_path"] = model
    if origin.data.chat_template:
        values["data"]["chat_template"] = None
    if origin.train.get("eos_token"):
        values["train"]["eos_token"] = None
    if origin.lora:
        values["lora"]["target_modules"] = "all-linear"


def _set_rows(values: Values, origin: Recipe, formats: Sequence[str], chosen: set[str]) -> None:
    """Other rows: what the origin says about its own source goes with it."""
    data = values["data"]
    _reset(data, origin, _OF_THE_SOURCE)
    if origin.data.filters != FiltersSection():
        data["filters"] = FiltersSection().model_dump()
    prompt_format: str = origin.data.prompt_format
    if prompt_format not in formats and "data.prompt_format" not in chosen:
        prompt_format = formats[0]
        data["prompt_format"] = prompt_format
    if prompt_format != "chat":
        _reset(data, origin, _OF_CHAT)
        if origin.train.get("assistant_only_loss"):
            values["train"]["assistant_only_loss"] = False
    if list(formats) == ["raw"] and origin.train.get("completion_only_loss"):
        values["train"]["completion_only_loss"] = None
    values["train"] |= {"max_steps": -1, "eval_steps": 0.2, "save_steps": 0.2}


def _reset(data: Values, origin: Recipe, keys: Sequence[str]) -> None:
    """Set keys of `data` back to their defaults, where the origin has other values."""
    for key in keys:
        default = DataSection.model_fields[key].default
        if getattr(origin.data, key) != default:
            data[key] = default or None  # null empties a mapping, which {} would only add to


def _set_method(values: Values, origin: Recipe, method: Method) -> None:
    """Another method, with the learning rate that goes with it."""
    if method == "full":
        values["lora"] = None
    elif origin.lora is None:
        values["lora"] = dict(_NEW_ADAPTER)
    if method == "qlora":
        values["quantization"] = origin.quantization or FOUR_BITS
    elif origin.quantization is not None:
        values["quantization"] = None
    rate = origin.train.get("learning_rate")
    had_adapter = origin.lora is not None
    if rate and had_adapter != (method != "full"):
        factor = 1 / _RATE_OF_ADAPTER if had_adapter else _RATE_OF_ADAPTER
        values["train"]["learning_rate"] = float(f"{rate * factor:.3g}")


def chosen_keys(words: Sequence[str]) -> set[str]:
    """Return the dotted keys that `section.key=value` words set, those inside a mapping too."""
    keys: set[str] = set()
    for document in read_words(words):
        keys.update(dotted(path) for path in document.origins)
    return keys


def _write(into: Values, chosen: Values, resolved: Values, target: Path) -> None:
    """Merge chosen values into others; paths, absolute in `resolved`, count from the recipe."""
    for key, value in chosen.items():
        found = resolved.get(key)
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _write(into[key], value, found if isinstance(found, dict) else {}, target)
        elif isinstance(found, str) and found != value and Path(found).exists():
            into[key] = relative_path(target, Path(found))
        else:
            into[key] = value


def schema_line(target: Path, schema: Path | None = None) -> str:
    """Return the first line of a file at `target`, by which editors find its schema (a recipe's);
    none outside of the checkout: the schema of an installed package goes with its environment.
    """
    root = project_root().resolve()
    if not target.resolve().is_relative_to(root):
        return ""
    path = relative_path(target, schema or root / "schema/recipe.schema.json")
    return f"{_SCHEMA_MARK}{path}"


def copy_of(file: Path, target: Path) -> str:
    """Return the text of a profile or an accelerate config, to be written to `target`."""
    lines = file.read_text("utf-8").split("\n")
    if lines[0].startswith(_SCHEMA_MARK):
        first = schema_line(target, file.parent / lines[0].removeprefix(_SCHEMA_MARK))
        lines[:1] = [first] if first else []
    return "\n".join(lines)
