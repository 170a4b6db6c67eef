"""The end of a study: comparison, report, gate. Until all is there, its arms are not compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.findings import Finding
from recipes_lib.analysis.gate import gate
from recipes_lib.analysis.looks import Look
from recipes_lib.analysis.readers.ours import load_arms
from recipes_lib.analysis.report import write_report
from recipes_lib.analysis.runs import ArmRuns, Arms
from recipes_lib.analysis.text import sentence_list
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import hash_of, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.evals.log import EvalLog
from recipes_lib.study import progress
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.study.lock import changes, lock_design, note_look, run_names, shown_looks
from recipes_lib.study.trainings import is_trained, study_folder, study_trainings


@dataclass(frozen=True)
class Standing:
    """A study at a look, or at its only test: what was measured, declared, and may be said."""

    look: Look | None
    arms: Arms
    design: Design
    conclusion: Conclusion
    results: str  # at a look the hash of every value that a test can see
    stops: bool  # whether nothing more is to be trained for this study


def results_hash(arms: Arms) -> str:
    """Return the hash of every value that a test can see."""
    values = []
    for _, run in arms.runs:
        for metric in run.metrics:
            items = [[sample.id, sample.turn, sample.value] for sample in metric.samples]
            values.append([run.name, metric.name, metric.opponent, metric.value, items])
    return hash_of(sorted(values, key=str))


def standings(study: Study) -> list[Standing]:
    """Return the study at each look that it came to: it goes on from one that left a pair open."""
    changed = changes(study)
    shown = shown_looks(study)
    reached: list[Standing] = []
    went_on = ""
    for look in study.looks or (None,):
        part = study.at(look)
        missing = tuple(progress.missing_of(part))
        design = replace(part.design, missing=missing, changed=changed, went_on=went_on)
        arms = measured_arms(part)
        if design.missing:
            # a win rate between two arms would be a verdict before its time
            arms = without_duels(arms)
        results = results_hash(arms) if look else ""
        record = shown.get(look.number) if look else None
        if look and record and not missing and record["results"] != results:
            changed += (f"what {look.place} saw changed since {record['written'][:10]}",)
            design = replace(design, changed=changed)
        conclusion = _with_dropped(study, conclude(arms, part.aims, design))
        stops = look is None or look.is_last or not conclusion.undecided
        if record and changed:
            stops = record["stops"]  # without verdicts nothing is decided anew
        reached.append(Standing(look, arms, design, conclusion, results, stops))
        if look is None or missing or stops:
            break
        pairs = [f"{first} and {second}" for first, second in conclusion.undecided]
        went_on = f"{look.place.capitalize()}, left {sentence_list(pairs, 3)} undecided."
    return reached


def conclude_study(study: Study) -> tuple[Arms, Design, Conclusion]:
    """Return what was measured, what the study declares, and what may be said."""
    standing = standings(study)[-1]
    return standing.arms, standing.design, standing.conclusion


def _with_dropped(study: Study, conclusion: Conclusion) -> Conclusion:
    """Return a conclusion that names runs which an earlier version of the study had trained."""
    names = run_names(study) - {training.run for training in study_trainings(study)}
    dropped = [name for name in sorted(names) if RunDirectory(name).exists()]
    if dropped:
        title = "Trained for this study, now dropped from it: the choice may follow the results"
        finding = Finding("dropped-training", "warning", title, tuple(dropped))
        conclusion = replace(conclusion, findings=conclusion.findings + (finding,))
    return conclusion


def report_study(study: Study) -> tuple[Conclusion, tuple[str, ...]]:
    """Write the report, and the design's lock before a first result; return what is missing too."""
    lock_design(study)
    reached = standings(study)
    for standing in reached:
        if standing.look and not standing.design.missing:
            note_look(study, standing.look, standing.results, standing.stops)
    last = reached[-1]
    folder = study_folder(study)
    write_json(folder / "comparison.json", last.conclusion.to_dict())
    write_report(folder / "report", last.conclusion, last.arms, last.design)
    return last.conclusion, last.design.missing


def measured_arms(study: Study) -> Arms:
    """Return the study's runs as it has them now, without results of other evals and settings."""
    folders: dict[str, list[Path]] = {}
    base = progress.base_run(study)
    if study.file.include_base and base != BASE_ARM:
        folders[BASE_ARM] = [runs_root() / base]
    for training in filter(is_trained, study_trainings(study)):
        folders.setdefault(training.arm.name, []).append(RunDirectory(training.run).path)
    results = filter(progress.is_evaluated, progress.evaluations(study))
    files = {result.file.resolve() for result in results}
    titles = {recipe.name: recipe.title for recipe in study.evals}
    arms = load_arms(folders, titles)
    return _with_logs(arms, lambda log: log.file.resolve() in files, unfinished=())


def without_duels(arms: Arms) -> Arms:
    """Return arms without the results that compare two of them, such as win rates head to head."""
    return _with_logs(arms, lambda log: arms.opponent(log.against) not in arms.by_name)


def _with_logs(arms: Arms, keeps: Callable[[EvalLog], bool], **changes: Any) -> Arms:
    """Return arms with the results that `keeps` says, and other changes of every run."""
    kept: dict[str, ArmRuns] = {}
    for arm in arms:
        runs = []
        for run in arm.runs:
            evals = tuple(filter(keeps, run.evals))
            runs.append(replace(run, evals=evals, **changes))
        kept[arm.name] = ArmRuns(arm.name, tuple(runs))
    return Arms(kept)


def gate_study(study: Study) -> tuple[ExitCode, list[str]]:
    """Return 6 and what is missing, or what the gate says of the arms and the baseline."""
    _, design, conclusion = conclude_study(study)
    if design.missing:
        lines = [f"missing: {name}" for name in design.missing]
        lines.append(f"next: {design.command}")
        return ExitCode.EVALUATION_INCOMPLETE, lines
    arms = [arm.name for arm in study.arms]
    return gate(conclusion, arms, study.baseline, conclusion.aims.margins)
