"""Confounds that no recipe shows: what runs recorded about data, splits, prompts, processes,
hardware and libraries, or was published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.findings import Finding, Severity
from recipes_lib.compare.published import load_published
from recipes_lib.compare.validity.settings import pairs
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.generation.fingerprints import hash_of

if TYPE_CHECKING:
    from pathlib import Path

    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements


@dataclass(frozen=True)
class _Circumstance:
    """One thing that runs recorded: `read` returns {what: value} of a run; a factor that may change
    one of `keys` declares it.
    """

    code: str
    severity: Severity
    what: str
    keys: tuple[str, ...]
    read: Callable[[RunMeasurements], Mapping[str, Any]]
    remedy: str


_THREADS = re.compile(r", \d+ threads?\Z")


def _guard(name: str) -> Callable[[RunMeasurements], Mapping[str, Any]]:
    return lambda run: (
        {name: value} if (value := (run.state.get("guard") or {}).get(name)) is not None else {}
    )


def _base(run: RunMeasurements) -> Mapping[str, Any]:
    """What identifies the weights that the run began with, as its own weights recorded it: a name
    may stand for other files later.
    """
    for name in ("adapter", "model"):
        with suppress(
            DamagedFile
        ):  # what a damaged record does not tell is not compared; `recipes verify` names the damage
            if found := read_object(run.folder / name / "weights_check.json").get(
                "base_fingerprint"
            ):
                return {"weights": str(found)[:12]}
    return {}


def _splits(run: RunMeasurements) -> Mapping[str, Any]:
    """Each part with its size and a hash of its rows' ids."""
    parts = {
        name: part
        for name, part in run.splits.items()
        if isinstance(part, dict) and "count" in part
    }
    return {
        name: f"{part['count']} rows, {hash_of(sorted(map(str, part.get('ids', []))))[:12]}"
        for name, part in parts.items()
    }


def _launch(run: RunMeasurements) -> Mapping[str, Any]:
    guard = run.state.get("guard") or {}
    return {
        key.removeprefix("launch."): guard[key]
        for key in ("launch.world_size", "launch.distribution")
        if key in guard
    }


def _steps(run: RunMeasurements) -> Mapping[str, Any]:
    steps = (run.state.get("summary") or {}).get("steps")
    return {"optimizer steps": steps} if steps is not None else {}


def _devices(run: RunMeasurements) -> Mapping[str, Any]:
    devices = run.environment.get("devices")
    # "CPU, 2 cores, 1 threads": how many threads were free says nothing about the hardware.
    return (
        {"devices": "; ".join(_THREADS.sub("", str(device)) for device in devices)}
        if devices
        else {}
    )


def _libraries(run: RunMeasurements) -> Mapping[str, Any]:
    libraries = run.environment.get("libraries") or {}
    python = str(run.environment.get("python") or "").rpartition(".")[0]
    return {**libraries, **({"python": python} if python else {})} if libraries else {}


def _code(run: RunMeasurements) -> Mapping[str, Any]:
    git = run.environment.get("git") or {}
    return (
        {"commit": f"{str(git['commit'])[:12]}{' with changes' if git.get('dirty') else ''}"}
        if git.get("commit")
        else {}
    )


_DATA = ("data", "data.source", "data.split", "data.max_examples", "data.filters")
_SAME_DATA = "train both arms on the same rows: the same source, revision and split"
CIRCUMSTANCES = (
    _Circumstance(
        "confound-data", "error", "training data", _DATA, _guard("data_fingerprint"), _SAME_DATA
    ),
    _Circumstance(
        "confound-base",
        "error",
        "base model's weights",
        ("model", "model.name_or_path", "model.revision"),
        _base,
        "train both arms from the same files: pin model.revision, or keep the model's folder as"
        " it is",
    ),
    _Circumstance(
        "confound-split",
        "error",
        "splits",
        _DATA,
        _splits,
        "use split.method: hash, which holds the same rows out everywhere",
    ),
    _Circumstance(
        "confound-prompt-format",
        "error",
        "prompt format in training",
        ("data", "data.prompt_format", "data.chat_template"),
        _guard("prompt_format_hash"),
        "train both arms with one prompt format",
    ),
    _Circumstance(
        "confound-world-size",
        "warning",
        "number of processes",
        ("launch", "launch.accelerate", "launch.gpus", "launch.world_size"),
        _launch,
        "train both arms on the same number of processes: dropout and the order of rows depend"
        " on it",
    ),
    _Circumstance(
        "confound-steps",
        "error",
        "number of optimizer steps",
        (
            *_DATA,
            "train.num_train_epochs",
            "train.max_steps",
            "train.max_length",
            "train.packing",
            "train.dataloader_drop_last",
            "train.per_device_train_batch_size",
            "train.gradient_accumulation_steps",
            "run.global_batch_size",
            "launch.world_size",
        ),
        _steps,
        "train both arms for as many steps: declare run.global_batch_size, and give both the same"
        " epochs or train.max_steps",
    ),
    _Circumstance(
        "confound-hardware",
        "warning",
        "hardware",
        (),
        _devices,
        "train both arms on the same hardware",
    ),
    _Circumstance(
        "confound-versions",
        "warning",
        "library versions",
        (),
        _libraries,
        "train both arms in one environment",
    ),
    _Circumstance(
        "code-differs", "note", "version of this code", (), _code, "train both arms from one commit"
    ),
)


def check_circumstances(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield, per two trained arms, what their runs recorded differently."""
    trained = {name: arm for name, arm in measurements.arms.items() if arm.runs and not arm.is_base}
    for first, second in pairs(trained):
        for circumstance in CIRCUMSTANCES:
            if study is not None and any(
                study.factor_of(key) is not None for key in circumstance.keys
            ):
                continue
            yield from _compare(circumstance, study, trained[first], trained[second])
    if study is not None and study.published is not None:
        yield from _published(study, study.published)


def _published(study: Study, file: Path) -> Iterator[Finding]:
    """What was published of two arms that were made elsewhere, where no recipe can say it."""
    published = load_published(file)
    told = {
        arm.name: published.circumstances[arm.name]
        for arm in study.arms
        if not arm.trained and arm.name in published.circumstances
    }
    for first, second in pairs(told):
        one, other = told[first], told[second]
        differing = [what for what in one if what in other and one[what] != other[what]]
        if differing:
            title = (
                f"As published, {' and '.join(differing)}"
                f" {'differ' if len(differing) > 1 else 'differs'} between {first} and {second}"
            )
            evidence = tuple(
                f"{what}: {first} {one[what]}, {second} {other[what]} ({published.path.name})"
                for what in differing
            )
            yield Finding(
                "confound-published",
                "warning",
                title,
                evidence,
                "train both arms here, alike",
                (first, second),
            )


def _compare(
    circumstance: _Circumstance,
    study: Study | None,
    first: ArmMeasurements,
    second: ArmMeasurements,
) -> Iterator[Finding]:
    """One finding where a value that both recorded differs; an arm's runs may have recorded
    several.
    """
    one, other = (_recorded(arm, circumstance) for arm in (first, second))
    evidence = tuple(
        f"{what}: {first.name} {' and '.join(one[what])}, {second.name} {' and '.join(other[what])}"
        for what in one
        if what in other and one[what] != other[what]
    )
    if evidence:
        differ = "differ" if circumstance.what.endswith("s") else "differs"
        title = (
            f"{circumstance.what[0].upper()}{circumstance.what[1:]} {differ} between {first.name}"
            f" and {second.name}"
        )
        # Without a study nothing is said about causes, so a confound cannot stop anything.
        severity: Severity = (
            "warning"
            if study is None and circumstance.severity == "error"
            else circumstance.severity
        )
        yield Finding(
            circumstance.code,
            severity,
            title,
            evidence,
            circumstance.remedy,
            (first.name, second.name),
        )


def _recorded(arm: ArmMeasurements, circumstance: _Circumstance) -> dict[str, list[str]]:
    """What an arm's runs recorded: {what: the values, each once}."""
    found: dict[str, list[str]] = {}
    for run in arm.runs:
        for what, value in circumstance.read(run).items():
            if str(value) not in found.setdefault(what, []):
                found[what].append(str(value))
    return {what: sorted(values) for what, values in found.items()}
