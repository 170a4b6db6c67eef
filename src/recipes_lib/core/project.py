"""Where things lie: the project's folders, the runs, the cache, and which names a run may have.

Nothing here creates a folder or reads a recipe.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from recipes_lib.core.errors import RecipeError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_DEVICE_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)),
}


@lru_cache(maxsize=1)
def project_root() -> Path:
    """Return the checkout that holds recipes/, accelerate_configs/ and schema/.

    That is the checkout this library runs from. For a library that was installed elsewhere it is
    the nearest folder at or above the working directory that has an accelerate_configs/, else the
    working directory.
    """
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "src" / "recipes_lib").is_dir():
        return checkout
    here = Path.cwd()
    return next(
        (folder for folder in (here, *here.parents) if (folder / "accelerate_configs").is_dir()),
        here,
    )


def runs_root() -> Path:
    """Return the folder of all runs: RECIPES_RUNS_ROOT, default `runs` in the working directory."""
    return Path(os.environ.get("RECIPES_RUNS_ROOT") or Path.cwd() / "runs")


def cache_root() -> Path:
    """Return the folder for materialised models: RECIPES_CACHE, default `.cache` in the
    checkout.
    """
    return Path(os.environ.get("RECIPES_CACHE") or project_root() / ".cache")


def recipe_path(name: str | Path) -> Path:
    """Return the file a recipe's path or short name means: `quickstart/lora-r8` is
    recipes/quickstart/lora-r8.yaml.

    Short names are looked for in recipes/ of the working directory, then of the project. A name
    that is found nowhere is returned as it is, so that reading it says so.
    """
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    places = (
        folder / f"{name}.yaml" for folder in (Path(), Path("recipes"), project_root() / "recipes")
    )
    return next((place for place in places if place.is_file()), path)


def shown_path(path: Path) -> str:
    """Return `path` as a user would type it: relative to the working directory when it lies inside.

    Symbolic links are not followed, so the name stays the one that was given.
    """
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (resolve would follow links)
    return (
        str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
    )


def check_run_name(name: str, file: str | Path | None = None, line: int | None = None) -> str:
    """Return `name` if a run may have it: one folder name that is legal on every system.

    Raises:
        RecipeError: the name is empty, too long, has other characters, ends with a dot, or is a
            Windows device name.
    """
    if (
        not RUN_NAME.match(name)
        or name.endswith(".")
        or name.split(".")[0].lower() in _DEVICE_NAMES
    ):
        raise RecipeError(
            f"run.name {name!r} cannot be a folder name",
            "use 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit and not"
            " ending with a dot",
            file=file,
            line=line,
        )
    return name
