"""Reads the runs of this project: a folder with evaluations, training curves and facts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.analysis.curves import read_curves
from recipes_lib.analysis.runs import ArmRuns, Arms, Run
from recipes_lib.config.documents import read as read_document
from recipes_lib.core.errors import DataError
from recipes_lib.core.files import read_object
from recipes_lib.core.run_directory import damaged_section
from recipes_lib.evals.log import read_eval_logs

FORM = "runs of this project: their names or folders"


def matches(path: Path) -> bool:
    """Whether a folder is a run of this project."""
    return (path / "run.json").is_file()


def read(path: Path) -> list[Run]:
    """Return the run of a folder."""
    return [load_run(path)]


def load_arms(folders: Mapping[str, Sequence[Path]]) -> Arms:
    """Return everything that was measured, of each arm the folders (one per seed) that exist."""
    arms: dict[str, ArmRuns] = {}
    for name, paths in folders.items():
        runs = tuple(load_run(path) for path in paths if path.is_dir())
        arms[name] = ArmRuns(name, runs)
    return Arms(arms)


def load_run(folder: Path) -> Run:
    """Return what a run's folder holds; what has no file is empty."""
    recipe = folder / "resolved.yaml"  # a base has none
    resolved: dict[str, Any] = {}
    if recipe.is_file():
        resolved = read_document(recipe).values or {}
    seed = (resolved.get("train") or {}).get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        seed = None
    state = read_object(folder / "run.json")
    damage = damaged_section(state)
    if damage:
        raise DataError(damage, "restore it, or train again", file=folder / "run.json")
    evals, unfinished = read_eval_logs(folder)
    return Run(
        name=folder.name,
        folder=folder,
        state=state,
        resolved=resolved,
        environment=read_object(folder / "environment.json"),
        splits=read_object(folder / "splits.json"),
        curves=read_curves(folder / "metrics.jsonl"),
        evals=evals,
        unfinished=unfinished,
        seed=seed,
    )
