"""Where things lie: what is shipped, the runs, the cache, and which names a run may have."""

import os
import re
from pathlib import Path

from recipes_lib.core.errors import RecipeError

PACKAGE = Path(__file__).resolve().parents[1]


def project_root() -> Path:
    """Return the folder of recipes/, evals/ and so on: the checkout, or the installed package's."""
    checkout = PACKAGE.parents[1]
    if (checkout / "recipes").is_dir():
        return checkout
    return PACKAGE / "shipped"


def runs_root() -> Path:
    """Return the folder of all runs: RECIPES_RUNS_ROOT, default `runs` in the working directory."""
    return Path(os.environ.get("RECIPES_RUNS_ROOT") or Path.cwd() / "runs")


def cache_root() -> Path:
    """Return the folder for what can be made again: RECIPES_CACHE, or a default."""
    usual = project_root() / ".cache"
    if usual.is_relative_to(PACKAGE):  # an upgrade replaces the installed package's folder
        usual = Path.home() / ".cache/recipes"
    return Path(os.environ.get("RECIPES_CACHE") or usual)


def recipe_path(name: str | Path) -> Path:
    """Return the file of a path or short name (`quickstart/lora-r8`, or of another shipped file
    `launch/profiles/example`); the name where it is none.
    """
    path = Path(name)
    file = path if path.suffix in (".yaml", ".yml") else Path(f"{name}.yaml")
    shipped = project_root()
    for candidate in (path, file, "recipes" / file, shipped / "recipes" / file, shipped / file):
        if candidate.is_file():
            return candidate
    return path


def shown_path(path: Path) -> str:
    """Return `path` as a user would type it: relative if it lies in the working directory."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (resolve would follow links)
    if absolute.is_relative_to(Path.cwd()):
        return str(absolute.relative_to(Path.cwd()))
    return str(path)


def check_run_name(name: str, file: str | Path | None = None, line: int | None = None) -> str:
    """Return `name` if a run may have it: it can be the name of a folder everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith("."):
        what = f"run.name {name!r} cannot be a folder name"
        hint = "use 1 to 100 letters, digits, '.', '_' or '-'; no dot at its start or end"
        raise RecipeError(what, hint, file=file, line=line)
    return name
