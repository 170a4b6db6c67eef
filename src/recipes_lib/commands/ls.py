"""recipes ls: the recipes of this project and of the working directory, by model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_lib.config.documents import read
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say

_START = "start-here"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    words = "only recipes whose name, model, method, launch or tags hold every word"
    parser.add_argument("words", metavar="WORD", nargs="*", help=words)
    parser.add_argument("--json", action="store_true", help="the list as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Print one line per recipe under its model; nothing is checked or planned."""
    found = [entry for file in recipe_files() if (entry := _entry(file)) is not None]
    words = [word.lower() for word in args.words]
    found = [entry for entry in found if all(word in str(entry).lower() for word in words)]
    models = {entry["model"]: _START in entry["tags"] for entry in reversed(found)}
    for entry in found:
        models[entry["model"]] |= _START in entry["tags"]
    found.sort(key=lambda entry: (not models[entry["model"]], entry["model"], entry["name"]))
    if args.json:
        return print_json(found)
    if not found:
        say(f"no recipes match {' '.join(words)}" if words else "no recipes here")
        next_step("recipes ls" if words else "recipes new my-first --from quickstart/lora-r8")
        return ExitCode.DONE
    head = ("  recipe", "method", "launch", "tags")
    lines = aligned(
        [head]
        + [
            (f"  {entry['name']}", entry["method"], entry["launch"], ", ".join(entry["tags"]))
            for entry in found
        ]
    )
    say(lines[0])
    model = None
    for entry, line in zip(found, lines[1:], strict=True):
        if entry["model"] != model:
            model = entry["model"]
            say(model)
        say(line)
    first = next((entry for entry in found if _START in entry["tags"]), found[0])
    next_step(f"recipes new my-first --from {first['name']}")
    return ExitCode.DONE


def recipe_files() -> list[Path]:
    """Return the files under recipes/ of the project and of the working directory, bases left
    out.
    """
    folders = {
        folder.resolve(): folder
        for folder in (project_root() / "recipes", Path("recipes"))
        if folder.is_dir()
    }
    return [
        file
        for folder in folders.values()
        for file in sorted(folder.rglob("*.yaml"))
        if not file.name.startswith("_")
    ]


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
