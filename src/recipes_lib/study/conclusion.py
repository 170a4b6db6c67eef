"""The end of a study: the comparison of what was measured, and the report. Reads files alone."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.compare.claims import Comparison, compare_arms
from recipes_lib.compare.design import BASE_ARM, Study
from recipes_lib.compare.measurements import Measurements, RunMeasurements, read_measurements
from recipes_lib.compare.validity import check_validity
from recipes_lib.core.atomic_files import publish, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.terminal import first_of
from recipes_lib.eval_log import REFERENCE
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report
from recipes_lib.study.arms import study_folder
from recipes_lib.study.runs import (
    base_run,
    evaluations,
    is_evaluated,
    is_trained,
    missing_of,
    study_trainings,
)

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True)
class Conclusion:
    """What a study says: its comparison, where the report lies, and what is not measured yet."""

    comparison: Comparison
    folder: Path
    missing: tuple[str, ...]


def measured_runs(study: Study) -> dict[str, list[Path]]:
    """Return arm -> folders of the runs that are trained as the study has it now."""
    base = base_run(study)
    measured = {BASE_ARM: [runs_root() / base]} if base else {}
    for one in study_trainings(study):
        if is_trained(study, one):
            measured.setdefault(one.arm.name, []).append(one.directory.path)
    return measured


def of_study(measurements: Measurements, study: Study) -> Measurements:
    """Return the measurements without what is not the study's: other evals of the same runs, and
    results of other settings. An evaluation whose result is left out counts as unfinished.
    """
    done = {
        (one.run, one.recipe.name, one.against): is_evaluated(study, one)
        for one in evaluations(study)
    }

    def kept(run: RunMeasurements) -> RunMeasurements:
        evals = []
        for log in run.evals:
            against = "" if log.against in (None, REFERENCE) else str(log.against)
            if done.get((run.name, log.eval, against)):
                evals.append(log)
        mine = [(name, is_done) for (owner, name, _), is_done in done.items() if owner == run.name]
        missing = dict.fromkeys(name for name, is_done in mine if not is_done)
        return dataclasses.replace(run, evals=tuple(evals), unfinished=tuple(missing))

    arms = {
        name: dataclasses.replace(arm, runs=tuple(map(kept, arm.runs)))
        for name, arm in measurements.arms.items()
    }
    return dataclasses.replace(measurements, arms=arms)


def compare_study(study: Study) -> tuple[Measurements, Comparison]:
    """Return what was measured, and the comparison of the arms.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """
    measurements = of_study(read_measurements(measured_runs(study)), study)
    return measurements, compare_arms(measurements, check_validity(study, measurements), study)


def conclude(study: Study, *, keep: bool = True) -> Conclusion:
    """Compare the arms and write the report.

    Args:
        keep: False to write nothing, where the study's folder is read-only.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """
    missing = missing_of(study)
    measurements, comparison = compare_study(study)
    folder = study_folder(study) / "report"
    if keep:
        write_json(study_folder(study) / COMPARISON_FILE, comparison.to_dict())
        banners = [f"Not measured yet: {first_of(missing, 6)}."] if missing else []
        scratch = folder.with_name(".report.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        write_report(scratch, gather(study.name, measurements, comparison, study, banners))
        publish(scratch, folder)
    return Conclusion(comparison, folder, tuple(missing))
