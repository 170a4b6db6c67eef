"""`recipes ls`: the recipes of this project and of the working directory, by model."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from recipes_lib.commands import Json
from recipes_lib.config.documents import read
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_START = "start-here"


def run(
    words: Annotated[list[str], "only recipes whose line or model holds every word"] = [],  # noqa: B006 (it is not changed)
    *,
    json: Json = False,
) -> int:
    """Print one line per recipe under its model; nothing is checked or planned."""
    folders = {folder.resolve(): folder for folder in (project_root() / "recipes", Path("recipes"))}
    entries = [
        entry
        for folder in folders.values()
        for file in sorted(folder.rglob("*.yaml"))
        if not file.name.startswith("_") and (entry := _entry(file, folder)) is not None
    ]
    for word in words:
        entries = [entry for entry in entries if word.lower() in str(entry).lower()]
    starts = {entry["model"] for entry in entries if _START in entry["tags"]}
    entries.sort(key=lambda entry: (entry["model"] not in starts, entry["model"], entry["name"]))
    if json:
        return print_json(entries)
    if not entries:
        say(f"no recipes match {' '.join(words)}" if words else "no recipes here")
        new = "recipes new my-first --from quickstart/lora-r8"
        return next_step("recipes ls" if words else new)
    columns = ("name", "method", "launch")
    rows = [[*(entry[key] for key in columns), ", ".join(entry["tags"])] for entry in entries]
    head, *lines = aligned([("recipe", "method", "launch", "tags"), *rows])
    say(f"  {head}")
    listed = zip(entries, lines, strict=True)
    for model, group in groupby(listed, key=lambda pair: pair[0]["model"]):
        say("\n".join([model, *(f"  {line}" for _, line in group)]))
    first = next((entry for entry in entries if _START in entry["tags"]), entries[0])
    return next_step("recipes", "new", "my-first", "--from", first["name"])


def _entry(file: Path, folder: Path) -> dict[str, Any] | None:
    """Return what is listed of a file; None for a file of another kind."""
    name = file.relative_to(folder).with_suffix("").as_posix()
    try:
        document = read(file)
        if document.kind != "recipe":
            return None
    except RecipesError:
        why = f"cannot be read: recipes check {shown_path(file)}"
        return {"name": name, "model": why, "method": "-", "launch": "-", "tags": []}
    values = document.values
    sections = {key: value if isinstance(value, dict) else {} for key, value in values.items()}
    method, lora, tags = "full", sections.get("lora"), sections.get("run", {}).get("tags")
    if lora:
        kind = "DoRA" if lora.get("use_dora") else "LoRA"
        method = f"{'Q' if sections.get('quantization') else ''}{kind} r={lora.get('r', 8)}"
    return {
        "name": name,
        "model": str(sections.get("model", {}).get("name_or_path", "?")),
        "method": method,
        "launch": str(sections.get("launch", {}).get("accelerate", "single_gpu")),
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
    }
