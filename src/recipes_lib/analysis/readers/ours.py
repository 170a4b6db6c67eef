"""Reads the runs of this project: a folder with evaluations, training curves and facts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    return [_titled(load_run(path))]


def load_arms(
    folders: Mapping[str, Sequence[Path]], titles: Mapping[str, str | None] | None = None
) -> Arms:
    """Return everything that was measured, of each arm the folders (one per seed) that exist;
    `titles` are the evals' of now.
    """
    arms: dict[str, ArmRuns] = {}
    for name, paths in folders.items():
        runs = tuple(_titled(load_run(path), titles) for path in paths if path.is_dir())
        arms[name] = ArmRuns(name, runs)
    return Arms(arms)


def _titled(run: Run, titles: Mapping[str, str | None] | None = None) -> Run:
    """Return a run whose metrics are named by their eval's title, by default the recorded one."""
    evals = []
    for log in run.evals:
        title = log.recipe.get("title") if titles is None else titles.get(log.eval)
        metrics = []
        for metric in log.metrics:
            label = metric.label.replace(log.eval, str(title or log.eval))
            metrics.append(replace(metric, label=label))
        evals.append(replace(log, metrics=tuple(metrics)))
    return replace(run, evals=tuple(evals))


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
