"""The end of a study: what was measured is compared, the design is locked, and the report written.

`runs/<study>/design.json` is written with the first report that has verdicts: arms, seeds, evals,
the primary metric and margins. A study that is changed afterwards has no verdicts any more.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.analysis.aims import Design, TunedArm
from recipes_lib.analysis.claims import Conclusion, conclude
from recipes_lib.analysis.report import write_report
from recipes_lib.analysis.runs import ArmRuns, Arms, Run, load_arms
from recipes_lib.analysis.text import sentence_list
from recipes_lib.core.files import hash_of, object_or_none, publish, utc_now, write_json
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.evals.log import REFERENCE
from recipes_lib.study.arms import study_folder
from recipes_lib.study.config import BASE_ARM, Study
from recipes_lib.study.runs import (
    base_run,
    evaluations,
    is_evaluated,
    is_trained,
    missing_of,
    study_trainings,
)

COMPARISON_FILE, DESIGN_FILE = "comparison.json", "design.json"


@dataclass(frozen=True)
class StudyReport:
    """What a study says, where the report lies, and what is not measured yet."""

    conclusion: Conclusion
    folder: Path
    missing: tuple[str, ...]


def conclude_study(study: Study) -> tuple[Arms, Design, Conclusion]:
    """Return what was measured, what the study declares, and what may be said.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """
    arms = measured_arms(study)
    design = design_of(study, tuple(missing_of(study)))
    return arms, design, conclude(arms, study.aims, design)


def report_study(study: Study, *, keep: bool = True) -> StudyReport:
    """Compare the arms, write the report, and lock the design with the first verdicts.

    Args:
        keep: False to write nothing, where the study's folder is read-only.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """
    arms, design, conclusion = conclude_study(study)
    folder = study_folder(study) / "report"
    if keep:
        write_json(study_folder(study) / COMPARISON_FILE, conclusion.to_dict())
        scratch = folder.with_name(".report.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        write_report(scratch, conclusion, arms, design)
        publish(scratch, folder)
        if not conclusion.descriptive and not (study_folder(study) / DESIGN_FILE).is_file():
            locked = {"written": utc_now(), **locked_design(study)}
            write_json(study_folder(study) / DESIGN_FILE, locked)
    return StudyReport(conclusion, folder, design.missing)


def measured_arms(study: Study) -> Arms:
    """Return the study's own runs, trained as it has them now, with its own results alone: those of
    other evals and of other settings are left out.
    """
    base = base_run(study)
    folders = {BASE_ARM: [runs_root() / base]} if base else {}
    for training in study_trainings(study):
        if is_trained(study, training):
            folders.setdefault(training.arm.name, []).append(training.directory.path)
    done = {
        (one.run, one.recipe.name, one.against): is_evaluated(study, one)
        for one in evaluations(study)
    }

    def own(run: Run) -> Run:
        logs = tuple(
            log
            for log in run.evals
            if done.get(
                (run.name, log.eval, "" if log.against in (None, REFERENCE) else log.against)
            )
        )
        return dataclasses.replace(run, evals=logs, unfinished=())

    return Arms(
        {arm.name: ArmRuns(arm.name, tuple(map(own, arm.runs))) for arm in load_arms(folders)}
    )


def _opponent(against: str | None) -> str:
    return "" if against in (None, REFERENCE) else str(against)


def design_of(study: Study, missing: tuple[str, ...] = ()) -> Design:
    """Return what a study declares."""
    tuned = {
        arm.name: TunedArm(
            arm.tuning.key,
            arm.tuning.values,
            arm.tuning.chosen,
            arm.tuning.losses,
            arm.tuning.candidates[0].seeds[0] if arm.tuning.candidates else None,
        )
        for arm in study.arms
        if arm.tuning
    }
    words = " ".join([shown_path(study.path), *study.words])
    return Design(
        name=study.name,
        question=study.question,
        factors=study.factors,
        values={arm.name: arm.resolved() for arm in study.arms},
        tuned=tuned,
        missing=missing,
        changed=tuple(changes(study)),
        reference=study.reference,
        command=f"recipes study run {words}",
    )


# ---- The lock ----


def locked_design(study: Study) -> dict[str, Any]:
    """Return what must not change once verdicts were seen."""
    return {
        "arms": {arm.name: hash_of(_of_arm(arm.resolved())) for arm in study.arms},
        "seeds": {arm.name: sorted(arm.seeds) for arm in study.arms},
        "base": study.include_base,
        "evals": {recipe.name: hash_of(_of_eval(recipe.to_dict())) for recipe in study.evals},
        "primary": study.aims.primary,
        "margins": {word: margin.size for word, margin in study.aims.margins.items()},
        "pairs": study.pairs,
    }


def _of_arm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Where a job runs and how many seeds there are is no other arm."""
    free = ("train.seed", "launch.accelerate", "launch.gpus", "launch.nodes")
    return {key: value for key, value in values.items() if key not in free}


def _of_eval(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked and who judges, not how fast."""
    return {key: values.get(key) for key in ("suite", "data", "metrics", "judge")}


def changes(study: Study) -> Iterator[str]:
    """Yield what differs from the design of the first report with verdicts."""
    locked = object_or_none(study_folder(study) / DESIGN_FILE)
    if not locked:
        return
    now, when = locked_design(study), f"since {str(locked.get('written'))[:10]}"
    for key, word in (("arms", "arm"), ("evals", "eval"), ("seeds", "seeds of")):
        before, after = locked.get(key) or {}, now[key]
        added = [f"{word} {name}" for name in after if name not in before]
        removed = [f"{word} {name}" for name in before if name not in after]
        other = [
            f"{word} {name}" for name in after if name in before and after[name] != before[name]
        ]
        for verb, names in (("added", added), ("removed", removed), ("changed", other)):
            if names and not (key == "seeds" and verb != "changed"):
                yield f"{verb} {when}: {sentence_list(names)}"
    if locked.get("primary") != now["primary"]:
        yield f"the primary metric was {locked.get('primary')} and is {now['primary']}"
    for key in ("margins", "base", "pairs"):
        if locked.get(key) != now[key]:
            yield f"{key} changed {when}"
