"""The end of a study: comparison, report, design lock, and the gate for CI.

`runs/<study>/design.json` is written with the first report that has verdicts: arms, seeds, evals,
the primary metric and margins. A study that is changed afterwards has no verdicts any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recipes_lib.analysis.aims import Design, is_named
from recipes_lib.analysis.checks import Finding
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.report import write_report
from recipes_lib.analysis.runs import ArmRuns, Arms, Run, load_arms
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import hash_of, object_or_none, publish, utc_now, write_json
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import run as runs
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.training.resume_guard import differences, flatten

_LOCK = "design.json"
# Where a job runs makes no other arm, how fast it answers no other eval; seeds are listed.
_FREE_OF_ARM = ("train.seed", "launch.accelerate", "launch.gpus", "launch.nodes")
_FREE_OF_EVAL = ("generation", "thresholds")


def conclude_study(study: Study) -> tuple[Arms, Design, Conclusion]:
    """Return what was measured, what the study declares, and what may be said."""
    words = " ".join([shown_path(study.path), *study.words])
    design = Design(
        name=study.name,
        question=study.file.question,
        factors=study.file.factors,
        values={arm.name: arm.resolved() for arm in study.arms},
        tuned={arm.name: arm.tuning for arm in study.arms if arm.tuning},
        missing=tuple(runs.missing_of(study)),
        changed=changes(study),
        reference=study.file.reference,
        command=f"recipes study run {words}",
    )
    arms = measured_arms(study)
    conclusion = conclude(arms, study.aims, design)
    names = {file.stem for file in runs.study_folder(study).glob("*/*.yaml")}
    names -= {training.run for training in runs.study_trainings(study)}
    there = [name for name in sorted(names) if RunDirectory(name).exists()]
    if dropped := tuple(name for name in there if "--tune-" not in name):
        title = "Trained for this study and not part of it now: the choice may follow the results"
        finding = Finding("dropped-training", "warning", title, dropped)
        conclusion = replace(conclusion, findings=(*conclusion.findings, finding))
    return arms, design, conclusion


def report_study(study: Study) -> tuple[Conclusion, tuple[str, ...]]:
    """Write the report, and lock the design with its first verdicts; return what is missing too."""
    arms, design, conclusion = conclude_study(study)
    folder = runs.study_folder(study)
    write_json(folder / "comparison.json", conclusion.to_dict())
    scratch = folder / ".report.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    write_report(scratch, conclusion, arms, design)
    publish(scratch, folder / "report")
    if not conclusion.descriptive and not (folder / _LOCK).is_file():
        write_json(folder / _LOCK, {"written": utc_now(), **design_values(study)})
    return conclusion, design.missing


def measured_arms(study: Study) -> Arms:
    """Return the study's runs as it has them now, without results of other evals and settings."""
    base = runs.base_run(study)
    is_there = study.file.include_base and base != BASE_ARM
    folders = {BASE_ARM: [runs_root() / base]} if is_there else {}
    for training in filter(runs.is_trained, runs.study_trainings(study)):
        folders.setdefault(training.arm.name, []).append(training.directory.path)
    evaluated = filter(runs.is_evaluated, runs.evaluations(study))
    files = {result.file.resolve() for result in evaluated}

    def own(run: Run) -> Run:
        logs = tuple(log for log in run.evals if log.file.resolve() in files)
        return replace(run, evals=logs, unfinished=())

    loaded = load_arms(folders)
    return Arms({arm.name: ArmRuns(arm.name, tuple(map(own, arm.runs))) for arm in loaded})


def design_values(study: Study) -> dict[str, Any]:
    """Return what must not change once verdicts were seen."""

    def hashed(values: dict[str, Any], free: Sequence[str]) -> str:
        return hash_of({key: value for key, value in values.items() if key not in free})

    return {
        "arms": {arm.name: hashed(arm.resolved(), _FREE_OF_ARM) for arm in study.arms},
        "evals": {recipe.name: hashed(recipe.to_dict(), _FREE_OF_EVAL) for recipe in study.evals},
        "seeds": {arm.name: sorted(arm.seeds) for arm in study.arms},
        "base": study.file.include_base,
        "primary": study.aims.primary,
        "margins": {word: margin.size for word, margin in study.aims.margins.items()},
    }


def changes(study: Study) -> tuple[str, ...]:
    """Return what differs from the design of the first report with verdicts."""
    locked = object_or_none(runs.study_folder(study) / _LOCK)
    if not locked:
        return ()
    now, since = design_values(study), str(locked.get("written"))[:10]
    changed = differences(flatten({key: locked.get(key) for key in now}), flatten(now))
    return tuple(
        f"{key} {'added' if old is None else 'removed' if new is None else 'changed'} since {since}"
        for key, (old, new) in changed.items()
    )


def gate(study: Study) -> tuple[ExitCode, list[str]]:
    """Return whether an arm is worse than the baseline, or not shown to hold its margin, and why.

    An arm that tests as worse fails also where a finding stops the sentence: a gate that opens
    because its judge failed would be none.

    Returns:
        6 and what is missing, 1 and the sentences that fail, or 0.
    """
    _, design, conclusion = conclude_study(study)
    baseline = study.baseline
    claims = [
        claim for claim in conclusion.claims if baseline in claim.row.arms and not claim.row.aside
    ]
    missing, failed = [f"missing: {what}" for what in design.missing], list[str]()
    for claim in claims:
        if claim.worse_than(baseline):
            failed.append(claim.sentence)
        elif claim.row.margin is not None and not claim.not_worse_than(baseline):
            failed.append(f"not shown: {claim.sentence}")
    for arm in (arm.name for arm in study.arms if arm.name != baseline):
        rows = [claim.row for claim in claims if arm in claim.row.arms]
        if not design.missing and not any(row.is_tested for row in rows):
            missing.append(f"no comparison of {arm} with {baseline} can be tested: see the report")
        for word in study.aims.margins:
            if not any(is_named(word, row.metric) and row.margin is not None for row in rows):
                failed.append(f"not shown: {arm} and {baseline} have no comparison on {word}")
    lines = [*missing, *failed] or [f"passed: no arm is shown to be worse than {baseline}"]
    lines += [f"next: {design.command}"] if design.missing else []
    code = ExitCode.EVALUATION_INCOMPLETE if missing else ExitCode(bool(failed))
    return code, lines
