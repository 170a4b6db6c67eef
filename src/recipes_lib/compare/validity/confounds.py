"""What differs between two arms besides the declared factors: in their recipes, in what runs
recorded, in what was published, in the design of the study, and in what their validation losses are
means over.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from recipes_lib.compare.design import LOSS_PRECISION, LOSS_TOKENS, TUNE
from recipes_lib.compare.findings import Finding, found
from recipes_lib.compare.measurements import ArmMeasurements, RunMeasurements
from recipes_lib.compare.published import load_published
from recipes_lib.compare.validity.case import (
    SEED,
    Case,
    Values,
    changes_result,
    declared_by,
    differing,
    effective,
    pairs,
    setting_text,
    settings_differ,
    told_apart,
    with_derived_values,
)
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.json_files import DamagedFile, read_object

_NAMED = 4
_Recorded = Callable[[RunMeasurements], Mapping[str, Any]]  # {what: value} of a run


def check_recipes(case: Case) -> Iterator[Finding]:
    """Yield one finding per two arms that differ in an undeclared key. It lists every such key,
    those that change no result marked; where there are no others, and without a study, it is a
    note.
    """
    for arms in pairs(case.values):
        one, other = with_derived_values(*(case.values[name] for name in arms))
        every = differing(one, other)
        keys = [key for key in every if declared_by(case.study, key, one, other) is None]
        tuned = [key for key in keys if f"{TUNE}{key.removeprefix(TUNE)}" in keys]
        if tuned:
            yield found("confound-tuning", settings_differ(tuned, arms, one, other), arms)
        keys = [key for key in keys if key not in tuned]
        heavy = [key for key in keys if changes_result(key, one, other)]
        idle = [key for key in keys if key not in heavy]
        evidence = settings_differ(heavy, arms, one, other)
        evidence += [
            f"{line} (changes no result)" for line in settings_differ(idle, arms, one, other)
        ]
        if case.study is None:
            kind = "differences"
        elif heavy == [SEED]:
            kind = "differences/twins" if every == heavy else "differences/seed"
        else:
            kind, idle = ("confound", []) if heavy else ("differences/idle", idle)
        if keys:
            named, more = [*heavy, *idle][:_NAMED], len(heavy) + len(idle) - _NAMED
            told = ", ".join(named) + (f" and {more} more" if more > 0 else "")
            yield found(kind, evidence, arms, keys=told)


# ---- What runs recorded ----


def _guard(*names: str) -> _Recorded:
    def read(run: RunMeasurements) -> Mapping[str, Any]:
        guard = run.state.get("guard") or {}
        known = [name for name in names if guard.get(name) is not None]
        return {name.removeprefix("launch."): guard[name] for name in known}

    return read


def _base(run: RunMeasurements) -> Mapping[str, Any]:
    """What identifies the weights that the run began with, as its own weights recorded it. Of a
    base, those that were evaluated.
    """
    if run.is_base:
        known = run.state.get("base_fingerprint")
        return {"weights": str(known)[:12]} if known else {}
    for name in ("adapter", "model"):
        # What a damaged record does not tell is not compared; `recipes verify` names the damage.
        with suppress(DamagedFile):
            record = read_object(run.folder / name / "weights_check.json")
            if record.get("base_fingerprint"):
                return {"weights": str(record["base_fingerprint"])[:12]}
    return {}


def _splits(run: RunMeasurements) -> Mapping[str, Any]:
    """Each part with its size and a hash of its rows' ids."""
    return {
        name: f"{part['count']} rows, {hash_of(sorted(map(str, part.get('ids', []))))[:12]}"
        for name, part in run.splits.items()
        if isinstance(part, dict) and "count" in part
    }


def _steps(run: RunMeasurements) -> Mapping[str, Any]:
    steps = (run.state.get("summary") or {}).get("steps")
    return {} if steps is None else {"optimizer steps": steps}


def _devices(run: RunMeasurements) -> Mapping[str, Any]:
    # "CPU, 2 cores, 1 threads": how many threads were free says nothing about the hardware.
    devices = [
        re.sub(r", \d+ threads?\Z", "", str(device))
        for device in run.environment.get("devices") or ()
    ]
    return {"devices": "; ".join(devices)} if devices else {}


def _libraries(run: RunMeasurements) -> Mapping[str, Any]:
    libraries = run.environment.get("libraries") or {}
    python = str(run.environment.get("python") or "").rpartition(".")[0]
    return {**libraries, **({"python": python} if python and libraries else {})}


def _code(run: RunMeasurements) -> Mapping[str, Any]:
    git = run.environment.get("git") or {}
    changes = " with changes" if git.get("dirty") else ""
    return {"commit": f"{str(git['commit'])[:12]}{changes}"} if git.get("commit") else {}


_DATA = ("data", "data.source", "data.split", "data.max_examples", "data.filters")
_OF_STEPS = (
    "train.num_train_epochs",
    "train.max_steps",
    "train.max_length",
    "train.packing",
    "train.dataloader_drop_last",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "run.global_batch_size",
    "launch.world_size",
)
# Code: what runs recorded, and the keys of which a factor may declare it.
CIRCUMSTANCES: dict[str, tuple[_Recorded, tuple[str, ...]]] = {
    "confound-data": (_guard("data_fingerprint"), _DATA),
    "confound-base": (_base, ("model", "model.name_or_path", "model.revision")),
    "confound-split": (_splits, _DATA),
    "confound-prompt-format": (
        _guard("prompt_format_hash", "training_template_hash"),
        ("data", "data.prompt_format", "data.chat_template", "data.chat_template_kwargs"),
    ),
    "confound-world-size": (
        _guard("launch.world_size", "launch.distribution"),
        ("launch", "launch.accelerate", "launch.gpus", "launch.world_size"),
    ),
    "confound-steps": (_steps, (*_DATA, *_OF_STEPS)),
    "confound-hardware": (_devices, ()),
    "confound-versions": (_libraries, ()),
    "code-differs": (_code, ()),
}


def check_circumstances(case: Case) -> Iterator[Finding]:
    """Yield, per two trained arms, what their runs recorded differently."""
    for arms in pairs(case.trained):
        for code, (read, keys) in CIRCUMSTANCES.items():
            if case.declares(*keys):
                continue
            one, other = (_values_seen(case.trained[name], read) for name in arms)
            evidence = [
                f"{what}: {arms[0]} {one[what]}, {arms[1]} {other[what]}"
                for what in told_apart(one, other)
            ]
            if evidence:
                finding = found(code, evidence, arms)
                # Without a study nothing is said about causes, so a confound stops nothing.
                stops = case.study is None and finding.severity == "error"
                yield replace(finding, severity="warning") if stops else finding


def check_evaluated_base(case: Case) -> Iterator[Finding]:
    """Yield whether an arm was trained on other weights than its base was evaluated with."""
    for base, arm in itertools.product(case.arms.keys() - case.trained.keys(), case.trained):
        now, then = (_values_seen(case.arms[name], _base).get("weights") for name in (base, arm))
        if now and then and now != then:
            evidence = [f"weights: {base} {now}, {arm} was trained on {then}"]
            finding = found("confound-base/evaluated", evidence, (arm, base))
            yield finding if case.study else replace(finding, severity="warning")


def _values_seen(arm: ArmMeasurements, read: _Recorded) -> dict[str, str]:
    """What an arm's runs recorded: {what: the values, each once}."""
    seen: dict[str, set[str]] = {}
    for run in arm.runs:
        for what, value in read(run).items():
            seen.setdefault(what, set()).add(str(value))
    return {what: " and ".join(sorted(values)) for what, values in seen.items()}


def check_published(case: Case) -> Iterator[Finding]:
    """Yield what was published of two arms that were made elsewhere, where no recipe can say it."""
    if case.study is None or case.study.published is None:
        return
    published = load_published(case.study.published)
    told = {
        arm.name: published.circumstances[arm.name]
        for arm in case.study.arms
        if not arm.trained and arm.name in published.circumstances
    }
    for first, second in pairs(told):
        one, other = told[first], told[second]
        if what := told_apart(one, other):
            evidence = [
                f"{name}: {first} {one[name]}, {second} {other[name]} ({published.path.name})"
                for name in what
            ]
            words = {"what": " and ".join(what), "differ": "differ" if what[1:] else "differs"}
            yield found("confound-published", evidence, (first, second), **words)


# ---- The design ----


def check_factors(case: Case) -> Iterator[Finding]:
    """Yield the cells of the factorial that have no arm, and, per two arms, factors that change
    together in every two arms of the study, so that no effect is one's own.
    """
    study = case.study
    if study is None or len(study.factors) < 2:
        return
    if missing := study.missing_cells():
        evidence = [
            "no arm has " + ", ".join(f"{factor}: {level}" for factor, level in cell.items())
            for cell in missing
        ]
        what = ("1 cell", "has") if len(missing) == 1 else (f"{len(missing)} cells", "have")
        yield found("missing-cell", evidence, cells=what[0], have=what[1])
    cells = {arm.name: arm.cell for arm in study.arms if set(study.factors) <= set(arm.cell)}
    changing = {
        (first, second): {
            factor for factor in study.factors if cells[first][factor] != cells[second][factor]
        }
        for first, second in pairs(cells)
    }
    for both in itertools.combinations(study.factors, 2):
        if any(len({*both} & factors) == 1 for factors in changing.values()):
            continue
        for arms in (arms for arms, factors in changing.items() if {*both} <= factors):
            first, second = arms
            one, other = (case.values.get(name, {}) for name in arms)
            evidence = [
                f"{factor}: {first} {cells[first][factor]}, {second} {cells[second][factor]}"
                for factor in both
            ]
            keys = [key for key in differing(one, other) if study.factor_of(key) in both]
            lines = settings_differ(keys, arms, one, other)
            evidence += [
                f"{study.factor_of(key)}, {line}" for key, line in zip(keys, lines, strict=True)
            ]
            yield found("confound-factors", evidence, arms, one=both[0], other=both[1])


# ---- Validation losses ----


def check_losses(case: Case) -> Iterator[Finding]:
    """Yield, per two arms with a validation loss, why the two are not the same measure."""
    measured = {
        name: arm.runs[0]
        for name, arm in case.arms.items()
        if any(line.get("eval_loss") is not None for line in arm.runs[0].curves)
    }
    for arms in pairs(measured):
        one, other = (case.values.get(name, {}) for name in arms)
        tokens, precision = (
            settings_differ(_not_alike(keys, one, other), arms, one, other)
            for keys in (LOSS_TOKENS, LOSS_PRECISION)
        )
        tokens += _rows_differ(*(measured[name] for name in arms))
        bits = [_bits(values) for values in (one, other)]
        if one and other and bits[0] != bits[1]:
            precision += [f"quantization: {arms[0]} {bits[0]}, {arms[1]} {bits[1]}"]
        for code, lines in (
            ("loss-of-other-tokens", tokens),
            ("loss-in-other-precision", precision),
        ):
            if lines:
                yield found(code, lines, arms, ("validation_loss",))


def _not_alike(keys: tuple[str, ...], one: Values, other: Values) -> list[str]:
    if not (one and other):
        return []
    inner = dict.fromkeys(
        name for name in (*one, *other) if name.startswith(tuple(f"{key}." for key in keys))
    )
    return [
        *(key for key in keys if (effective(key, one) or None) != (effective(key, other) or None)),
        *(name for name in inner if one.get(name) != other.get(name)),
    ]


def _bits(values: Values) -> str:
    """The bits of the base's weights."""
    bits = (bits for bits in (4, 8) if values.get(f"quantization.load_in_{bits}bit"))
    return next((f"{number} bit" for number in bits), "none")


def _rows_differ(one: RunMeasurements, other: RunMeasurements) -> list[str]:
    """What the runs themselves recorded about their rows."""
    lines = []
    for code in ("confound-data", "confound-split", "confound-prompt-format"):
        mine, theirs = (CIRCUMSTANCES[code][0](run) for run in (one, other))
        lines += [
            f"{name}: {setting_text(mine[name])} and {setting_text(theirs[name])}"
            for name in told_apart(mine, theirs)
            if name != "train"
        ]
    return lines
