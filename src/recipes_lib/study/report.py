"""The end of a study: comparison, report, design lock, and the gate for CI.

`runs/<study>/design.json` is written with the first report that has verdicts: arms, seeds, evals,
the primary metric and margins. A study that is changed afterwards has no verdicts any more.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from typing import Any

from recipes_lib.analysis.aims import Design, is_named
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.report import write_report
from recipes_lib.analysis.runs import ArmRuns, Arms, Run, load_arms
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import hash_of, object_or_none, publish, utc_now, write_json
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.study.runs import (
    base_run,
    evaluations,
    is_evaluated,
    is_trained,
    missing_of,
    study_folder,
    study_trainings,
)
from recipes_lib.training.resume_guard import differences, flatten

_LOCK = "design.json"
# Where a job runs makes no other arm, how fast it answers no other eval; seeds are listed.
_FREE_OF_ARM = ("train.seed", "launch.accelerate", "launch.gpus", "launch.nodes")
_FREE_OF_EVAL = ("generation", "thresholds")


def conclude_study(study: Study) -> tuple[Arms, Design, Conclusion]:
    """Return what was measured, what the study declares, and what may be said."""
    arms, design = measured_arms(study), design_of(study, tuple(missing_of(study)))
    return arms, design, conclude(arms, study.aims, design)


def report_study(study: Study) -> tuple[Conclusion, tuple[str, ...]]:
    """Write the report, and lock the design with its first verdicts; return what is missing too."""
    arms, design, conclusion = conclude_study(study)
    folder = study_folder(study)
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
    base = base_run(study)
    folders = {BASE_ARM: [runs_root() / base]} if base else {}
    for training in filter(is_trained, study_trainings(study)):
        folders.setdefault(training.arm.name, []).append(training.directory.path)
    done = {result.file.resolve() for result in evaluations(study) if is_evaluated(result)}

    def own(run: Run) -> Run:
        logs = tuple(log for log in run.evals if log.file.resolve() in done)
        return replace(run, evals=logs, unfinished=())

    loaded = load_arms(folders)
    return Arms({arm.name: ArmRuns(arm.name, tuple(map(own, arm.runs))) for arm in loaded})


def design_of(study: Study, missing: tuple[str, ...] = ()) -> Design:
    """Return what a study declares."""
    words = " ".join([shown_path(study.path), *study.words])
    return Design(
        name=study.name,
        question=study.file.question,
        factors=study.file.factors,
        values={arm.name: arm.resolved() for arm in study.arms},
        tuned={arm.name: arm.tuning for arm in study.arms if arm.tuning},
        missing=missing,
        changed=changes(study),
        reference=study.file.reference,
        command=f"recipes study run {words}",
    )


def design_values(study: Study) -> dict[str, Any]:
    """Return what must not change once verdicts were seen."""
    arms = {
        arm.name: {key: v for key, v in arm.resolved().items() if key not in _FREE_OF_ARM}
        for arm in study.arms
    }
    evals = {
        recipe.name: {key: v for key, v in recipe.to_dict().items() if key not in _FREE_OF_EVAL}
        for recipe in study.evals
    }
    return {
        "arms": {name: hash_of(values) for name, values in arms.items()},
        "seeds": {arm.name: sorted(arm.seeds) for arm in study.arms},
        "evals": {name: hash_of(values) for name, values in evals.items()},
        "base": study.file.include_base,
        "primary": study.aims.primary,
        "margins": {word: margin.size for word, margin in study.aims.margins.items()},
        "pairs": study.file.pairs,
    }


def changes(study: Study) -> tuple[str, ...]:
    """Return what differs from the design of the first report with verdicts."""
    locked = object_or_none(study_folder(study) / _LOCK)
    if not locked:
        return ()
    now, when = design_values(study), f"since {str(locked.get('written'))[:10]}"
    changed = differences(flatten({key: locked.get(key) for key in now}), flatten(now))
    return tuple(
        f"{key} {'added' if old is None else 'removed' if new is None else 'changed'} {when}"
        for key, (old, new) in changed.items()
    )


# ---- The gate ----


@dataclass(frozen=True)
class Gate:
    """Whether arms may stand in for their baseline; `worse` and `not_shown` are sentences."""

    baseline: str
    comparisons: int
    margins: list[str]
    missing: list[str]
    worse: list[str]
    not_shown: list[str]

    @property
    def code(self) -> ExitCode:
        """The exit code: 6 where results are missing, 1 where an arm fails."""
        if self.missing:
            return ExitCode.EVALUATION_INCOMPLETE
        return ExitCode.FAILED if self.worse or self.not_shown else ExitCode.DONE

    def to_dict(self) -> dict[str, object]:
        """Return the answer for --json."""
        return {**asdict(self), "passed": not self.code, "exit_code": int(self.code)}


def gate(study: Study) -> Gate:
    """Return whether an arm is worse than the baseline, or not shown to hold its margin.

    An arm that tests as worse fails also where a finding stops the sentence: a gate that opens
    because its judge failed would be none.
    """
    _, design, conclusion = conclude_study(study)
    baseline, margins = study.baseline, list(study.aims.margins)
    claims = [
        claim for claim in conclusion.claims if baseline in claim.row.arms and not claim.row.aside
    ]
    missing, worse, not_shown = list(design.missing), list[str](), list[str]()
    for claim in claims:
        if claim.worse_than(baseline):
            worse.append(claim.sentence)
        elif claim.row.margin is not None and not claim.not_worse_than(baseline):
            not_shown.append(claim.sentence)
    for arm in (arm.name for arm in study.arms if arm.name != baseline):
        rows = [claim.row for claim in claims if arm in claim.row.arms]
        if not design.missing and not any(row.is_tested for row in rows):
            missing.append(f"a comparison of {arm} with {baseline} that can be tested")
        held = [row.metric for row in rows if row.margin is not None]
        not_shown += [
            f"{arm} and {baseline} have no comparison on {word}"
            for word in margins
            if not any(is_named(word, metric) for metric in held)
        ]
    return Gate(baseline, len(claims), margins, missing, worse, not_shown)
