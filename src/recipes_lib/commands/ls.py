"""recipes ls: the recipes of this project and of the working directory."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from recipes_lib.config.loader import Document, load_document
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import next_step, say
from recipes_lib.planning.cards import DEFAULT, card_named
from recipes_lib.planning.plan_cache import quick_plans

_START = "start-here"
_HEAD = ("recipe", "method", "model", "launch", "memory", "time", "tags")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="only recipes whose name, model or tags hold every word",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per recipe; files that cannot be read are listed with the command that says
    why.
    """
    rows = _rows(recipe_files())
    rows = [
        row for row in rows if all(word.lower() in " ".join(row).lower() for word in args.words)
    ]
    if not rows:
        say(
            "no recipes"
            + (
                f" match {' '.join(args.words)}"
                if args.words
                else f" in {project_root() / 'recipes'} or ./recipes"
            )
        )
        next_step("recipes ls" if args.words else "recipes new my-first --from RECIPE")
        return ExitCode.DONE
    rows.sort(key=lambda row: not row[-1].startswith("start here"))
    widths = [max(len(row[column]) for row in (_HEAD, *rows)) for column in range(len(_HEAD) - 1)]
    for row in (_HEAD, *rows):
        say(
            "  ".join(
                [
                    *(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)),
                    row[-1],
                ]
            ).rstrip()
        )
    if any(row[4] != "-" for row in rows):
        on = f"{card_named(DEFAULT).title} or this machine's CPU"
        say(
            f"memory of one process and time are planned, for {on}; for other cards: recipes plan"
            " RECIPE --gpu CARD"
        )
    next_step(f"recipes new my-first --from {rows[0][0]}")
    return ExitCode.DONE


def recipe_files() -> list[Path]:
    """Return the files under recipes/ of the working directory and of the project, bases
    left out.
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


def _rows(files: list[Path]) -> list[tuple[str, ...]]:
    """Return a line per recipe; a YAML of another kind has none."""
    documents: dict[Path, Document] = {}
    rows: dict[Path, tuple[str, ...]] = {}
    for file in files:
        try:
            document = load_document(file)
        except RecipesError:
            rows[file] = (
                _name(file),
                "-",
                "-",
                "-",
                "-",
                "-",
                f"cannot be read: recipes check {shown_path(file)}",
            )
            continue
        if document.kind.name == "recipe":
            documents[file] = document
    for (file, document), needs in zip(
        documents.items(), quick_plans(list(documents.values())), strict=True
    ):
        rows[file] = _row(_name(file), document, needs)
    return [rows[file] for file in files if file in rows]


def _row(name: str, document: Document, needs: tuple[str, str]) -> tuple[str, ...]:
    """Return the line of a recipe; `needs` are planned memory and time."""
    sections: dict[str, Any] = {
        key: value if isinstance(value, dict) else {} for key, value in document.values.items()
    }
    launch, tags = sections.get("launch", {}), sections.get("run", {}).get("tags") or []
    marks = ["start here"] * (_START in tags) + [str(tag) for tag in tags if tag != _START]
    marks += ["rows from the Hub"] * _reads_the_hub(document)
    gpus = f" x{launch['gpus']}" if launch.get("gpus") else ""
    return (
        name,
        method(document.values),
        str(sections.get("model", {}).get("name_or_path", "?")),
        f"{launch.get('accelerate', 'single_gpu')}{gpus}",
        *needs,
        ", ".join(marks),
    )


def _reads_the_hub(document: Document) -> bool:
    """Whether a source of the rows is no file or folder: not beside the YAML that names it, not
    from the working directory.
    """
    source = document.values.get("data", {}).get("source")
    parts = source if isinstance(source, list) else [source]
    names = [part.get("source") if isinstance(part, dict) else part for part in parts]
    beside = Path(document.origin(("data", "source")).file).parent
    return any(
        isinstance(name, str) and not any((folder / name).exists() for folder in (beside, Path()))
        for name in names
    )


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
    real = Path(os.path.realpath(file))  # resolve() raises for a link that points to itself
    for folder in (Path("recipes").resolve(), project_root() / "recipes"):
        if real.is_relative_to(folder):
            return real.relative_to(folder).with_suffix("").as_posix()
    return shown_path(file)
