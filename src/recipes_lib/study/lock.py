"""The design lock: what a study declares, kept before the first result can be looked at.

`runs/<study>/design.json` is written before the first evaluation, with a hash of its own. Every run
that is evaluated afterwards keeps a copy of that hash in its run.json. So a lock that is lost, cut
or exchanged is seen, and leaves a study without verdicts instead of free. Beside the locked content
stand the looks that were taken: whether the study went on, and a hash of the results that it saw.
They have a hash of their own, for they are added one by one.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes_lib.analysis.looks import FUTILE_BELOW, Look
from recipes_lib.analysis.runs import DESIGN_LOCKS
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import Row, hash_of, object_or_none, utc_now, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory, damaged_section
from recipes_lib.data.sources import source_hashes
from recipes_lib.evals.recipe import hash_in
from recipes_lib.study.config import Study
from recipes_lib.study.trainings import REPLACED, is_trained, study_folder, study_trainings
from recipes_lib.training.resume_guard import differences, flatten

LOCK = "design.json"
RESULTS = "evals/*/result*.json"  # in a run's folder
SHOWN = "shown"  # in the lock, outside of its hash: the looks that were taken
SHOWN_HASH = "shown_hash"
# Where a job runs makes no other arm; seeds are listed.
_FREE = {"train.seed", "launch.accelerate", "launch.gpus", "launch.nodes"}


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
        copies = state.get(DESIGN_LOCKS, {}) | {study.name: lock["hash"]}
        if copies != state.get(DESIGN_LOCKS):
            RunDirectory(training.run).write_state(state["state"], **{DESIGN_LOCKS: copies})


def design_values(study: Study) -> dict[str, Any]:
    """Return what must not change once a result was seen."""
    arms: dict[str, str] = {}
    seeds: dict[str, list[int]] = {}
    data: dict[str, dict[str, str]] = {}
    for arm in study.arms:
        # the value that tuning chose is no part of what an arm declares
        free = _FREE | ({arm.tuning.key} if arm.tuning else set())
        written = flatten(arm.recipe.document.values)
        declared: dict[str, Any] = {}
        for key, value in arm.resolved().items():
            # later versions of this program add keys, empty where nobody wrote them
            if key not in free and (value or key in written):
                declared[key] = value
        arms[arm.name] = hash_in(study.document.path.parent, declared)
        # at looks the first seeds are tested alone
        seeds[arm.name] = list(arm.seeds) if study.looks else sorted(arm.seeds)
        with suppress(RecipesError):  # rows that are not on this machine
            hashes = source_hashes(arm.recipe.data)
            if hashes:
                data[arm.name] = hashes
    evals: dict[str, str] = {}
    opponents: list[str] = []
    for recipe in study.evals:
        evals[recipe.name] = recipe.settings_key(code=None)
        if recipe.opponent(None):
            opponents.append(f"{recipe.opponent(None)} {study.baseline}")
    looks: dict[str, object] = {}
    if study.looks:
        looks["after"] = [look.seeds for look in study.looks]
        looks["shares"] = [look.share for look in study.looks]
        looks["futile_below"] = FUTILE_BELOW
    return {
        "question": study.file.question,
        "factors": study.file.factors,
        "arms": arms,
        "data": data,
        "evals": evals,
        "opponents": opponents,
        "seeds": seeds,
        "looks": looks,
        "base": study.file.include_base,
        "primary": study.aims.primary,
        "margins": {metric: margin.size for metric, margin in study.aims.margins.items()},
    }


def read_lock(study: Study) -> Row | None:
    """Return the lock; None where there is none, or a hash is not that of its content."""
    lock = object_or_none(study_folder(study) / LOCK) or {}
    content = dict(lock)
    shown = content.pop(SHOWN, [])
    hashes = (content.pop("hash", None), content.pop(SHOWN_HASH, hash_of([])))
    if content and hashes == (hash_of(content), hash_of(shown)):
        return lock
    return None


def changed_values(study: Study, lock: Row | None) -> list[str]:
    """Return the dotted keys whose values are not those of the lock; of no lock, all."""
    now = design_values(study)
    if lock is None:
        return list(now)
    lock = {"looks": {}} | lock  # one without the key was written before there were looks
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for key in now.keys() & lock.keys():
        # a lock of an earlier version has fewer keys; no other has: it is proven by its hash
        before[key] = lock[key]
        after[key] = now[key]
    if "data" in before:  # rows that are not here cannot be compared, and cannot be trained on
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
    names = {folder: folder.name for folder in evaluated}
    # evaluated runs that were trained again since; their names end with the time of that
    runs = run_names(study)
    for folder in sorted((runs_root() / REPLACED).glob("*--*")):
        name, _, ending = folder.name.rpartition("--")
        if name in runs and ending.isdigit() and any(folder.glob(RESULTS)):
            names[folder] = name
    for folder, name in names.items():
        state = object_or_none(folder / "run.json") or {}
        damage = damaged_section(state)
        if damage:
            yield f"run.json of {name} {damage}"
            continue
        copies = state.get(DESIGN_LOCKS, {})
        copy = copies.get(study.name)
        if copy is not None:
            if copy != lock.get("hash"):
                yield f"{name} was evaluated under another {LOCK}"
        elif copies:
            yield f"{name} was evaluated in the study {next(iter(copies))}"
        elif folder in evaluated:
            logs = [object_or_none(file) or {} for file in folder.glob(RESULTS)]
            # times are written so that their texts have the order of the times
            if min(str(log.get("written")) for log in logs) < lock["written"]:
                yield f"{name} was evaluated before the design was locked"


def shown_looks(study: Study) -> dict[int, Row]:
    """Return what was noted of each look, by its number."""
    lock = read_lock(study) or {}
    return {record["look"]: record for record in lock.get(SHOWN, [])}


def note_look(study: Study, look: Look, results: str, stops: bool) -> None:
    """Note that a look was taken, with the hash of the results that it saw; the first hash stays,
    whatever is seen later.
    """
    lock = read_lock(study)
    if lock is None:
        return
    shown = shown_looks(study)
    record = {"look": look.number, "seeds": look.seeds, "results": results, "written": utc_now()}
    record |= shown.get(look.number, {})
    record["stops"] = stops
    if record != shown.get(look.number):
        shown[look.number] = record
        records = [shown[number] for number in sorted(shown)]
        noted = {SHOWN: records, SHOWN_HASH: hash_of(records)}
        write_json(study_folder(study) / LOCK, lock | noted)


def current_part(study: Study) -> Study:
    """Return the study with the seeds that it needs now: those of the look where it stands."""
    if read_lock(study) is None and evaluated_folders(study):
        return study  # no look can be noted: it trains on, and has no verdict
    shown = shown_looks(study)
    for look in study.looks:
        record = shown.get(look.number)
        if record is None or record["stops"]:
            return study.at(look)
    return study


def evaluated_folders(study: Study) -> list[Path]:
    """Return the folders of the study's runs, dropped ones too, that have a result of any eval."""
    folders = [runs_root() / name for name in sorted(run_names(study))]
    return [folder for folder in folders if any(folder.glob(RESULTS))]


def run_names(study: Study) -> set[str]:
    """Return the runs of the study's arms, and of those it had before; not of their tuning."""
    written = {file.stem for file in study_folder(study).glob("*/*.yaml")}
    trained = {name for name in written if "--tune-" not in name}
    return trained | {training.run for training in study_trainings(study)}
