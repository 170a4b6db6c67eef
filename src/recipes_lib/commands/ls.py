"""recipes ls: the recipes of this project and of the working directory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import Document, load_document
from recipes_lib.config.recipe import recipe_from
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.terminal import aligned, next_step, say
from recipes_lib.models.known import known_shapes
from recipes_lib.planning.cards import DEFAULT, card_named, cpu_card
from recipes_lib.planning.plan import plan_launched
from recipes_lib.planning.text import clock

_START = "start-here"
LARGEST_DATA = 300_000  # bytes; reading more would keep the list waiting
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
    rows = [row for file in recipe_files() if (row := _row(file))]
    words = [word.lower() for word in args.words]
    rows = [row for row in rows if all(word in " ".join(row).lower() for word in words)]
    if not rows:
        where = f" in {project_root() / 'recipes'} or ./recipes"
        say(f"no recipes{' match ' + ' '.join(args.words) if words else where}")
        next_step("recipes ls" if words else "recipes new my-first --from RECIPE")
        return ExitCode.DONE
    rows.sort(key=lambda row: not row[-1].startswith("start here"))
    for line in aligned([_HEAD, *rows]):
        say(line)
    if any(row[4] != "-" for row in rows):
        say(
            f"memory of one process and time are planned, for {card_named(DEFAULT).title} or this"
            " machine's CPU; for other cards: recipes plan RECIPE --gpu CARD"
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


def _row(file: Path) -> tuple[str, ...] | None:
    """Return the line of a recipe; a YAML of another kind has none."""
    try:
        document = load_document(file)
    except RecipesError:
        return (_name(file), *"-----", f"cannot be read: recipes check {shown_path(file)}")
    if document.kind.name != "recipe":
        return None
    sections: dict[str, Any] = {
        key: value if isinstance(value, dict) else {} for key, value in document.values.items()
    }
    launch, tags = sections.get("launch", {}), sections.get("run", {}).get("tags") or []
    marks = ["start here"] * (_START in tags) + [str(tag) for tag in tags if tag != _START]
    sources = _sources(document)
    marks += ["rows from the Hub"] * (None in sources)
    gpus = f" x{launch['gpus']}" if launch.get("gpus") else ""
    return (
        _name(file),
        method(document.values),
        str(sections.get("model", {}).get("name_or_path", "?")),
        f"{launch.get('accelerate', 'single_gpu')}{gpus}",
        *_planned(document, sources),
        ", ".join(marks),
    )


def _sources(document: Document) -> list[Path | None]:
    """Return the rows' files and folders, looked for beside the YAML that names them and from the
    working directory; None for those of the Hub.
    """
    source = document.values.get("data", {}).get("source")
    parts = source if isinstance(source, list) else [source]
    names = [part.get("source") if isinstance(part, dict) else part for part in parts]
    beside = Path(document.origin(("data", "source")).file).parent
    return [
        next((path for path in (beside / name, Path(name)) if path.exists()), None)
        for name in names
        if isinstance(name, str)
    ]


def _planned(document: Document, sources: Sequence[Path | None]) -> tuple[str, str]:
    """Return memory per process and time of a recipe's own launch, where they are had at once:
    without a network, large files or a GPU query; else only `recipes plan` can say.

    The document was not checked, which would take most of the time of the list: what cannot be
    planned has no numbers.
    """
    small = all(path is None or _is_small(path) for path in sources)
    try:
        recipe = recipe_from(document)
        if not small or recipe.model.name_or_path not in known_shapes():
            return ("-", "-")
        launch = plan_launch(recipe.launch)
        card = cpu_card() if launch.config.use_cpu else card_named(DEFAULT)
        plan = plan_launched(recipe, launch, card)
        return f"{plan.memory.needed:.1f} GiB", clock(plan.duration.total)
    except (RecipesError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return ("-", "-")


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LARGEST_DATA


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
