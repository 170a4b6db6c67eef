"""The end of a study: comparison, report, and the gate for CI.

Until everything that a study declares is there, its arms are not compared. A study whose design
changed after results were seen has no verdicts (`lock.py`).
"""

from __future__ import annotations

from dataclasses import replace

from recipes_lib.analysis.aims import Design, is_named
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.findings import Finding
from recipes_lib.analysis.readers.ours import load_arms
from recipes_lib.analysis.report import write_report
from recipes_lib.analysis.runs import ArmRuns, Arms, Run
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.study import run as runs
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.study.lock import changes, lock_design, run_names
from recipes_lib.study.trainings import is_trained, study_folder, study_trainings


def conclude_study(study: Study) -> tuple[Arms, Design, Conclusion]:
    """Return what was measured, what the study declares, and what may be said."""
    design = replace(study.design, missing=tuple(runs.missing_of(study)), changed=changes(study))
    arms = measured_arms(study)
    if design.missing:
        arms = without_duels(arms)
    conclusion = conclude(arms, study.aims, design)
    names = run_names(study) - {training.run for training in study_trainings(study)}
    dropped = [name for name in sorted(names) if RunDirectory(name).exists()]
    if dropped:
        title = "Trained for this study, now dropped from it: the choice may follow the results"
        finding = Finding("dropped-training", "warning", title, tuple(dropped))
        conclusion = replace(conclusion, findings=(*conclusion.findings, finding))
    return arms, design, conclusion


def report_study(study: Study) -> tuple[Conclusion, tuple[str, ...]]:
    """Write the report, and the design's lock before a first result; return what is missing too."""
    lock_design(study)
    arms, design, conclusion = conclude_study(study)
    folder = study_folder(study)
    write_json(folder / "comparison.json", conclusion.to_dict())
    write_report(folder / "report", conclusion, arms, design)
    return conclusion, design.missing


def measured_arms(study: Study) -> Arms:
    """Return the study's runs as it has them now, without results of other evals and settings."""
    base = runs.base_run(study)
    is_there = study.file.include_base and base != BASE_ARM
    folders = {BASE_ARM: [runs_root() / base]} if is_there else {}
    for training in filter(is_trained, study_trainings(study)):
        folders.setdefault(training.arm.name, []).append(RunDirectory(training.run).path)
    files = {each.file.resolve() for each in runs.evaluations(study) if runs.is_evaluated(each)}

    def own(run: Run) -> Run:
        logs = tuple(log for log in run.evals if log.file.resolve() in files)
        return replace(run, evals=logs, unfinished=())

    loaded = load_arms(folders)
    return Arms({arm.name: ArmRuns(arm.name, tuple(map(own, arm.runs))) for arm in loaded})


def without_duels(arms: Arms) -> Arms:
    """Return arms without the results that compare two of them, such as win rates head to head."""

    def alone(run: Run) -> Run:
        logs = [log for log in run.evals if arms.opponent(log.against) not in arms.by_name]
        return replace(run, evals=tuple(logs))

    return Arms({arm.name: ArmRuns(arm.name, tuple(map(alone, arm.runs))) for arm in arms})


def gate(study: Study) -> tuple[ExitCode, list[str]]:
    """Return 6 and what is missing; 1 and each arm that is worse than the baseline (also where a
    finding stops the sentence) or not shown to hold its margin; or 0.
    """
    _, design, report = conclude_study(study)
    if design.missing:
        lines = [f"missing: {what}" for what in design.missing]
        return ExitCode.EVALUATION_INCOMPLETE, [*lines, f"next: {design.command}"]
    baseline = study.baseline
    failed: list[str] = []
    missing: list[str] = []
    for arm in (arm.name for arm in study.arms if arm.name != baseline):
        claims = [c for c in report.claims if {arm, baseline} == {*c.row.arms} and not c.row.aside]
        if not any(claim.row.is_tested for claim in claims):
            missing.append(f"no comparison of {arm} with {baseline} can be tested: see the report")
        failed += [claim.sentence for claim in claims if claim.worse_than(baseline)]
        for word in study.aims.margins:
            held = [c for c in claims if c.row.margin is not None and is_named(word, c.row.metric)]
            unsure = [c for c in held if not (c.worse_than(baseline) or c.not_worse_than(baseline))]
            failed += [f"not shown: {claim.sentence}" for claim in unsure]
            failed += [f"not shown: no comparison of {arm} on {word}"] * (not held)
    lines = [*missing, *failed] or [f"passed: no arm is shown to be worse than {baseline}"]
    return ExitCode.EVALUATION_INCOMPLETE if missing else ExitCode(bool(failed)), lines
