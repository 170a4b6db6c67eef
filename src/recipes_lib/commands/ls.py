"""`recipes ls`: the recipes of this project and of the working directory, by model."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

from recipes_lib.commands import Json
from recipes_lib.config.documents import read
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_START = "start-here"


class ListedRecipe(NamedTuple):
    """What is listed of a recipe."""

    name: str
    model: str
    method: str = "-"
    launch: str = "-"
    tags: tuple[str, ...] = ()


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
        for file in sorted(folder.rglob("[!_]*.yaml"))
        if (entry := _entry(file, folder)) is not None
    ]
    for word in words:
        entries = [entry for entry in entries if word.lower() in str(tuple(entry)).lower()]
    starts = {entry.model for entry in entries if _START in entry.tags}
    entries.sort(key=lambda e: (e.model not in starts, e.model, _START not in e.tags, e.name))
    if json:
        return print_json([entry._asdict() for entry in entries])
    if not entries:
        say(f"no recipes match {' '.join(words)}")
        return next_step("recipes ls")
    rows = [[name, method, launch, ", ".join(tags)] for name, _, method, launch, tags in entries]
    head, *lines = aligned([("recipe", "method", "launch", "tags"), *rows])
    say(f"  {head}")
    for model, group in groupby(zip(entries, lines, strict=True), key=lambda pair: pair[0].model):
        say("\n".join([model, *(f"  {line}" for _, line in group)]))
    return next_step("recipes", "new", "my-first", "--from", entries[0].name)


def _entry(file: Path, folder: Path) -> ListedRecipe | None:
    """Return what is listed of a file; None for a file of another kind."""
    name = file.relative_to(folder).with_suffix("").as_posix()
    try:
        document = read(file)
        if document.kind != "recipe":
            return None
    except RecipesError:
        return ListedRecipe(name, f"cannot be read: recipes check {shown_path(file)}")
    values = document.values
    sections = {key: value if isinstance(value, dict) else {} for key, value in values.items()}
    method, lora, tags = "full", sections.get("lora"), sections.get("run", {}).get("tags")
    if lora:
        kind = "DoRA" if lora.get("use_dora") else "LoRA"
        method = f"{'Q' if sections.get('quantization') else ''}{kind} r={lora.get('r', 8)}"
    model = str(sections.get("model", {}).get("name_or_path", "?"))
    launch = str(sections.get("launch", {}).get("accelerate", "single_gpu"))
    shown = tuple(map(str, tags)) if isinstance(tags, list) else ()
    return ListedRecipe(name, model, method, launch, shown)
