"""`recipes ls`: the recipes of this project and of the working directory, by model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from recipes_lib.config.documents import read
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_START = "start-here"


def run(
    words: Annotated[
        list[str], "only recipes whose name, model, method, launch or tags hold every word"
    ] = [],  # noqa: B006 (it is not changed)
    *,
    json: Annotated[bool, "the list as JSON"] = False,
) -> int:
    """Print one line per recipe under its model; nothing is checked or planned."""
    entries = [entry for file in _recipe_files() if (entry := _entry(file)) is not None]
    for word in words:
        entries = [entry for entry in entries if word.lower() in str(entry).lower()]
    starts = {entry["model"] for entry in entries if _START in entry["tags"]}
    entries.sort(key=lambda entry: (entry["model"] not in starts, entry["model"], entry["name"]))
    if json:
        return print_json(entries)
    if not entries:
        say(f"no recipes match {' '.join(words)}" if words else "no recipes here")
        next_step("recipes ls" if words else "recipes new my-first --from quickstart/lora-r8")
        return ExitCode.DONE
    columns = ("name", "method", "launch")
    rows = [[*(entry[key] for key in columns), ", ".join(entry["tags"])] for entry in entries]
    head, *lines = aligned([("recipe", "method", "launch", "tags"), *rows])
    say(f"  {head}")
    listed = zip(entries, lines, strict=True)
    for model, group in groupby(listed, key=lambda pair: pair[0]["model"]):
        say("\n".join([model, *(f"  {line}" for _, line in group)]))
    first = next((entry for entry in entries if _START in entry["tags"]), entries[0])
    next_step(f"recipes new my-first --from {first['name']}")
    return ExitCode.DONE


def _recipe_files() -> list[Path]:
    """Return the files under recipes/ of the project and of the working directory, bases left
    out.
    """
    folders = {folder.resolve(): folder for folder in (project_root() / "recipes", Path("recipes"))}
    files = (file for folder in folders.values() for file in sorted(folder.rglob("*.yaml")))
    return [file for file in files if not file.name.startswith("_")]


def _entry(file: Path) -> dict[str, Any] | None:
    """Return what is listed of a file; None for a file of another kind."""
    name = shown_path(file)
    for folder in (Path("recipes").absolute(), project_root() / "recipes"):
        if file.absolute().is_relative_to(folder):
            name = file.absolute().relative_to(folder).with_suffix("").as_posix()
    try:
        document = read(file)
        kind = document.kind
    except RecipesError:
        why = f"cannot be read: recipes check {shown_path(file)}"
        return {"name": name, "model": why, "method": "-", "launch": "-", "tags": []}
    if kind != "recipe":
        return None
    sections: dict[str, Any] = {
        key: value if isinstance(value, dict) else {} for key, value in document.values.items()
    }
    tags = sections.get("run", {}).get("tags")
    return {
        "name": name,
        "model": str(sections.get("model", {}).get("name_or_path", "?")),
        "method": method(sections),
        "launch": str(sections.get("launch", {}).get("accelerate", "single_gpu")),
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
    }


def method(sections: Mapping[str, Any]) -> str:
    """Return the method in a word or two.

    Example:
        >>> method({"lora": {"r": 8}, "quantization": {"load_in_4bit": True}})
        'QLoRA r=8'
    """
    lora = sections.get("lora")
    if not lora:
        return "full"
    kind = "DoRA" if lora.get("use_dora") else "LoRA"
    return f"{'Q' if sections.get('quantization') else ''}{kind} r={lora.get('r', 8)}"
