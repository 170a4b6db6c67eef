"""The end of a study: comparison, report, design lock, and the gate for CI.

`runs/<study>/design.json` is written with the first report that has verdicts. A study that is
changed afterwards has no verdicts any more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes_lib.analysis.aims import Design, is_named
from recipes_lib.analysis.checks import Finding
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.report import write_report
from recipes_lib.analysis.runs import ArmRuns, Arms, Run, load_arms
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import object_or_none, utc_now, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.recipe import hash_in
from recipes_lib.study import run as runs
from recipes_lib.study.config import BASE_ARM, Arm, Study
from recipes_lib.training.resume_guard import differences, flatten

_LOCK = "design.json"
# Where a job runs makes no other arm; seeds are listed.
_FREE = {"train.seed", "launch.accelerate", "launch.gpus", "launch.nodes"}


def conclude_study(study: Study) -> tuple[Arms, Design, Conclusion]:
    """Return what was measured, what the study declares, and what may be said."""
    design = replace(study.design, missing=tuple(runs.missing_of(study)), changed=changes(study))
    arms = measured_arms(study)
    conclusion = conclude(arms, study.aims, design)
    names = {file.stem for file in runs.study_folder(study).glob("*/*.yaml")}
    names -= {training.run for training in runs.study_trainings(study)}
    dropped = [n for n in sorted(names) if "--tune-" not in n and RunDirectory(n).exists()]
    if dropped:
        title = "Trained for this study, now dropped from it: the choice may follow the results"
        finding = Finding("dropped-training", "warning", title, tuple(dropped))
        conclusion = replace(conclusion, findings=(*conclusion.findings, finding))
    return arms, design, conclusion


def report_study(study: Study) -> tuple[Conclusion, tuple[str, ...]]:
    """Write the report, and lock the design with its first verdicts; return what is missing too."""
    arms, design, conclusion = conclude_study(study)
    folder = runs.study_folder(study)
    write_json(folder / "comparison.json", conclusion.to_dict())
    write_report(folder / "report", conclusion, arms, design)
    if not conclusion.descriptive and not (folder / _LOCK).is_file():
        write_json(folder / _LOCK, {"written": utc_now(), **design_values(study)})
    return conclusion, design.missing


def measured_arms(study: Study) -> Arms:
    """Return the study's runs as it has them now, without results of other evals and settings."""
    base = runs.base_run(study)
    is_there = study.file.include_base and base != BASE_ARM
    folders = {BASE_ARM: [runs_root() / base]} if is_there else {}
    for training in filter(runs.is_trained, runs.study_trainings(study)):
        folders.setdefault(training.arm.name, []).append(RunDirectory(training.run).path)
    files = {each.file.resolve() for each in runs.evaluations(study) if runs.is_evaluated(each)}

    def own(run: Run) -> Run:
        logs = tuple(log for log in run.evals if log.file.resolve() in files)
        return replace(run, evals=logs, unfinished=())

    loaded = load_arms(folders)
    return Arms({arm.name: ArmRuns(arm.name, tuple(map(own, arm.runs))) for arm in loaded})


def design_values(study: Study) -> dict[str, Any]:
    """Return what must not change once verdicts were seen."""

    def hashed(arm: Arm) -> str:
        values, written = arm.resolved(), flatten(arm.recipe.document.values)
        # later versions add empty ones
        keys = [key for key in values.keys() - _FREE if values[key] or key in written]
        return hash_in(study.document.path.parent, {key: values[key] for key in keys})

    rivals = [each.opponent(None) for each in study.evals]
    return {
        "arms": {arm.name: hashed(arm) for arm in study.arms},
        "evals": {recipe.name: recipe.settings_key(code=None) for recipe in study.evals},
        "opponents": [f"{rival} {study.baseline}" for rival in rivals if rival],
        "seeds": {arm.name: sorted(arm.seeds) for arm in study.arms},
        "base": study.file.include_base,
        "primary": study.aims.primary,
        "margins": {word: margin.size for word, margin in study.aims.margins.items()},
    }


def changes(study: Study) -> tuple[str, ...]:
    """Return what differs from the design of the first report with verdicts."""
    locked = object_or_none(runs.study_folder(study) / _LOCK) or {}
    now = {key: value for key, value in design_values(study).items() if key in locked}
    changed = differences(flatten({key: locked[key] for key in now}), flatten(now))
    return tuple(f"{key} changed since {str(locked.get('written'))[:10]}" for key in changed)


def gate(study: Study) -> tuple[ExitCode, list[str]]:
    """Return 6 and what is missing; 1 and each arm that is worse than the baseline (also where a
    finding stops the sentence) or not shown to hold its margin; or 0.
    """
    _, design, report = conclude_study(study)
    baseline, failed = study.baseline, list[str]()
    missing = [f"missing: {what}" for what in design.missing]
    for arm in (arm.name for arm in study.arms if arm.name != baseline):
        claims = [c for c in report.claims if {arm, baseline} == {*c.row.arms} and not c.row.aside]
        if not design.missing and not any(claim.row.is_tested for claim in claims):
            missing.append(f"no comparison of {arm} with {baseline} can be tested: see the report")
        failed += [claim.sentence for claim in claims if claim.worse_than(baseline)]
        for word in study.aims.margins:
            held = [c for c in claims if c.row.margin is not None and is_named(word, c.row.metric)]
            unsure = [c for c in held if not (c.worse_than(baseline) or c.not_worse_than(baseline))]
            failed += [f"not shown: {claim.sentence}" for claim in unsure]
            failed += [f"not shown: no comparison of {arm} on {word}"] * (not held)
    lines = [*missing, *failed] or [f"passed: no arm is shown to be worse than {baseline}"]
    lines += [f"next: {design.command}"] * bool(design.missing)
    return ExitCode.EVALUATION_INCOMPLETE if missing else ExitCode(bool(failed)), lines
