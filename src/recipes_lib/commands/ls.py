"""recipes ls: the recipes of this project and of the working directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recipes_lib.errors import ExitCode, RecipesError
from recipes_lib.recipe.loader import Document, load_document
from recipes_lib.recipe.project import project_root, shown_path
from recipes_lib.terminal import next_step, say

_START = "start-here"
_HEAD = ("recipe", "method", "model", "launch", "memory", "time", "tags")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("words", metavar="WORD", nargs="*", help="only recipes whose name, model or tags hold every word")


def run(args: argparse.Namespace) -> int:
    """Print one line per recipe; files that cannot be read are listed with the command that says why."""
    rows = [row for file in recipe_files() if (row := _row(file))]
    rows = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in args.words)]
    if not rows:
        say("no recipes" + (f" match {' '.join(args.words)}" if args.words else f" in {project_root() / 'recipes'} or ./recipes"))
        next_step("recipes ls" if args.words else "recipes new my-first --from RECIPE")
        return ExitCode.DONE
    rows.sort(key=lambda row: not row[-1].startswith("start here"))
    widths = [max(len(row[column]) for row in (_HEAD, *rows)) for column in range(len(_HEAD) - 1)]
    for row in (_HEAD, *rows):
        say("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip())
    if any(row[4] != "-" for row in rows):
        from recipes_lib.planning.glance import CARD

        on = f"{CARD.title} or this machine's CPU"
        say(f"memory of one process and time are planned, for {on}; for other cards: recipes plan RECIPE --gpu CARD")
    next_step(f"recipes new my-first --from {rows[0][0]}")
    return ExitCode.DONE


def recipe_files() -> list[Path]:
    """Return the files under recipes/ of the working directory and of the project, bases left out."""
    folders = {folder.resolve(): folder for folder in (project_root() / "recipes", Path("recipes")) if folder.is_dir()}
    return [file for folder in folders.values() for file in sorted(folder.rglob("*.yaml")) if not file.name.startswith("_")]


def _row(file: Path) -> tuple[str, ...] | None:
    """Return the line of a recipe, or None for a YAML of another kind."""
    name = _name(file)
    try:
        document = load_document(file)
    except RecipesError:
        return (name, "-", "-", "-", "-", "-", f"cannot be read: recipes check {shown_path(file)}")
    if document.kind.name != "recipe":
        return None
    sections: dict[str, Any] = {key: value if isinstance(value, dict) else {} for key, value in document.values.items()}
    launch, tags = sections.get("launch", {}), sections.get("run", {}).get("tags") or []
    marks = ["start here"] * (_START in tags) + [str(tag) for tag in tags if tag != _START]
    marks += ["rows from the Hub"] * _reads_the_hub(document)
    gpus = f" x{launch['gpus']}" if launch.get("gpus") else ""
    return (
        name,
        method(document.values),
        str(sections.get("model", {}).get("name_or_path", "?")),
        f"{launch.get('accelerate', 'single_gpu')}{gpus}",
        *_needs(document),
        ", ".join(marks),
    )


def _needs(document: Document) -> tuple[str, str]:
    """Return the planned memory and time."""
    from recipes_lib.planning.glance import glance
    from recipes_lib.planning.text import clock

    seen = glance(document)
    return ("-", "-") if seen is None else (f"{seen[0]:.1f} GiB", clock(seen[1]))


def _reads_the_hub(document: Document) -> bool:
    """Whether a source of the rows is no file or folder: not beside the YAML that names it, not from the working directory."""
    source = document.values.get("data", {}).get("source")
    parts = source if isinstance(source, list) else [source]
    names = [part.get("source") if isinstance(part, dict) else part for part in parts]
    beside = Path(document.origin(("data", "source")).file).parent
    return any(isinstance(name, str) and not any((folder / name).exists() for folder in (beside, Path())) for name in names)


def method(values: dict[str, Any]) -> str:
    """Return the method in a word or two.

    Example:
        >>> method({"lora": {"r": 8}, "quantization": {"load_in_4bit": True}})
        'QLoRA r=8'
    """
    lora = values.get("lora")
    if not lora:
        return "full"
    return f"{'Q' if values.get('quantization') else ''}LoRA r={lora.get('r', 8)}"


def _name(file: Path) -> str:
    """Return the short name that `recipes show` and `recipes new --from` take."""
    for folder in (Path("recipes").resolve(), project_root() / "recipes"):
        if file.resolve().is_relative_to(folder):
            return file.resolve().relative_to(folder).with_suffix("").as_posix()
    return shown_path(file)
