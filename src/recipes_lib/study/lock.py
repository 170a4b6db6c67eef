"""The design lock: what a study declares, kept before the first result can be looked at.

`runs/<study>/design.json` is written before the first evaluation, with a hash of its own. Every run
that is evaluated afterwards keeps a copy of that hash in its run.json. So a lock that is lost, cut
or exchanged is seen, and leaves a study without verdicts instead of free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import Row, hash_of, object_or_none, utc_now, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.sources import source_hashes
from recipes_lib.evals.recipe import hash_in
from recipes_lib.study.config import Arm, Study
from recipes_lib.study.trainings import REPLACED, is_trained, study_folder, study_trainings
from recipes_lib.training.resume_guard import differences, flatten

LOCK = "design.json"
RESULTS = "evals/*/result*.json"  # in a run's folder
COPIES = "design_locks"  # in run.json: the name of a study -> the hash of its lock
# Where a job runs makes no other arm; seeds are listed.
_FREE = {"train.seed", "launch.accelerate", "launch.gpus", "launch.nodes"}


# ---- Writing it ----


def lock_design(study: Study) -> None:
    """Write the lock while nothing is evaluated; copy its hash into every run without a result."""
    evaluated = {folder.name for folder in evaluated_folders(study)}
    # beside results nothing is ever written: a lock that is gone by then stays gone
    if not evaluated and changed_values(study, read_lock(study)):
        content = {"written": utc_now()} | design_values(study)
        write_json(study_folder(study) / LOCK, content | {"hash": hash_of(content)})
    lock = read_lock(study)
    if lock is None:
        return
    for training in study_trainings(study):
        if training.run in evaluated or not is_trained(training):
            continue
        state = training.state
        copies = state.get(COPIES, {}) | {study.name: lock["hash"]}
        if copies != state.get(COPIES):
            RunDirectory(training.run).write_state(state["state"], **{COPIES: copies})


def design_values(study: Study) -> dict[str, Any]:
    """Return what must not change once a result was seen."""
    rivals = [recipe.opponent(None) for recipe in study.evals]
    hashes: dict[str, dict[str, str]] = {}
    for arm in study.arms:
        with suppress(RecipesError):  # rows that are not on this machine
            hashes[arm.name] = source_hashes(arm.recipe.data)
    return {
        "question": study.file.question,
        "factors": study.file.factors,
        "arms": {arm.name: _hash_of_arm(study, arm) for arm in study.arms},
        "data": {arm: of_rows for arm, of_rows in hashes.items() if of_rows},
        "evals": {recipe.name: recipe.settings_key(code=None) for recipe in study.evals},
        "opponents": [f"{rival} {study.baseline}" for rival in rivals if rival],
        "seeds": {arm.name: sorted(arm.seeds) for arm in study.arms},
        "base": study.file.include_base,
        "primary": study.aims.primary,
        "margins": {word: margin.size for word, margin in study.aims.margins.items()},
    }


def _hash_of_arm(study: Study, arm: Arm) -> str:
    """Return a hash of what an arm declares; the value that tuning chose is no part of that."""
    values = arm.resolved()
    written = flatten(arm.recipe.document.values)
    free = set(_FREE)
    if arm.tuning:
        free.add(arm.tuning.key)
    # later versions of this program add keys, empty where nobody wrote them
    keys = [key for key in values.keys() - free if values[key] or key in written]
    return hash_in(study.document.path.parent, {key: values[key] for key in keys})


# ---- Reading it ----


def read_lock(study: Study) -> Row | None:
    """Return the lock; None where there is none, or its hash is not that of its content."""
    lock = object_or_none(study_folder(study) / LOCK) or {}
    content = {key: value for key, value in lock.items() if key != "hash"}
    return lock if content and lock.get("hash") == hash_of(content) else None


def changed_values(study: Study, lock: Row | None) -> list[str]:
    """Return the dotted keys whose values are not those of the lock; of no lock, all."""
    now = design_values(study)
    if lock is None:
        return list(now)
    # A lock of an earlier version has fewer keys. No other has: it is proven by its hash.
    common = now.keys() & lock.keys()
    before = {key: lock[key] for key in common}
    after = {key: now[key] for key in common}
    if "data" in common:  # rows that are not here cannot be compared, and cannot be trained on
        after["data"] = {arm: now["data"].get(arm, old) for arm, old in before["data"].items()}
    return list(differences(flatten(before), flatten(after)))


def changes(study: Study) -> tuple[str, ...]:
    """Return what speaks against a design that stood before its results; nothing if it did."""
    evaluated = evaluated_folders(study)
    lock = read_lock(study)
    if lock is not None:
        day = str(lock["written"])[:10]
        reasons = [f"{key} changed since {day}" for key in changed_values(study, lock)]
        reasons += _early_results(study, evaluated, lock)
        return tuple(reasons)
    if not evaluated:
        return tuple(_early_results(study, [], {}))
    file = study_folder(study) / LOCK
    if not file.is_file():
        return (f"{evaluated[0].name} has results and the study has no {LOCK}",)
    if "hash" not in (object_or_none(file) or {"hash": ""}):
        return (f"{LOCK} was shortened, or written by an earlier version, after the results",)
    return (f"{LOCK} is damaged",)


def _early_results(study: Study, evaluated: list[Path], lock: Row) -> Iterator[str]:
    """Yield each run that was evaluated under another lock than this, or before it."""
    for folder in evaluated + _replaced_folders(study):
        name = folder.name
        if folder not in evaluated:
            name = name.rpartition("--")[0]  # without the time at which it was moved away
        state = object_or_none(folder / "run.json") or {}
        copies = state.get(COPIES) or {}
        copy = copies.get(study.name)
        if copy is not None and copy != lock.get("hash"):
            yield f"{name} was evaluated under another {LOCK}"
        elif copy is None and copies:
            yield f"{name} was evaluated in the study {next(iter(copies))}"
        elif copy is None and folder in evaluated:
            logs = [object_or_none(file) or {} for file in folder.glob(RESULTS)]
            # times are written so that their texts have the order of the times
            if min(str(log.get("written")) for log in logs) < lock["written"]:
                yield f"{name} was evaluated before the design was locked"


# ---- The runs that were looked at ----


def evaluated_folders(study: Study) -> list[Path]:
    """Return the folders of the study's runs, dropped ones too, that have a result of any eval."""
    folders = [runs_root() / name for name in sorted(run_names(study))]
    return [folder for folder in folders if any(folder.glob(RESULTS))]


def _replaced_folders(study: Study) -> list[Path]:
    """Return the folders of evaluated runs that were trained again since."""
    folders: list[Path] = []
    for name in run_names(study):
        for folder in (runs_root() / REPLACED).glob(f"{name}--*"):
            # any other ending belongs to a run of a longer name
            is_of_run = folder.name.rpartition("--")[2].isdigit()
            if is_of_run and any(folder.glob(RESULTS)):
                folders.append(folder)
    return sorted(folders)


def run_names(study: Study) -> set[str]:
    """Return the runs of the study's arms, and of those it had before; not of their tuning."""
    written = {file.stem for file in study_folder(study).glob("*/*.yaml")}
    trained = {name for name in written if "--tune-" not in name}
    return trained | {training.run for training in study_trainings(study)}
