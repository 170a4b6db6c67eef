"""The last two steps of a study: statistics over what was measured, and the report. Both read files
alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipes_lib.compare.claims import Comparison, compare_arms
from recipes_lib.compare.design import BASE_ARM, Study
from recipes_lib.compare.measurements import Measurements, RunMeasurements, read_measurements
from recipes_lib.compare.relabelling import Relabelling, VerdictOf, relabelled, table_hash
from recipes_lib.compare.row import TableRow
from recipes_lib.compare.validity import check_validity
from recipes_lib.compare.wording import count
from recipes_lib.core.atomic_files import publish, write_json
from recipes_lib.core.errors import DataError
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.core.json_files import read_object
from recipes_lib.core.project import runs_root
from recipes_lib.core.terminal import first_of, say
from recipes_lib.eval_recipe import UNJUDGED
from recipes_lib.report.content import gather
from recipes_lib.report.documents import write_report
from recipes_lib.study.arms import base_run, run_names, study_folder
from recipes_lib.study.graph import Freshness, Graph, Step
from recipes_lib.study.ledger import ledger_of, looked


@dataclass(frozen=True)
class Conclusion:
    """What a study says: its comparison, and where the report lies."""

    comparison: Comparison
    folder: Path
    complete: bool


def measured_runs(study: Study, graph: Graph) -> dict[str, list[Path]]:
    """Return arm -> folders of the runs whose training is done; what an earlier state of the study
    left is not among them.
    """
    todo = {step.run for step in graph.todo() if step.kind == "train"}
    published = {arm.name for arm in study.arms if arm.published_only}  # shown, with no run to read
    measured = {
        arm: [runs_root() / name for name in runs if name not in todo]
        for arm, runs in run_names(study).items()
    }
    return {arm: runs for arm, runs in measured.items() if runs or arm in published}


def of_study(measurements: Measurements, study: Study, graph: Graph) -> Measurements:
    """Return the measurements without what is not the study's: other evals of the same runs, and
    results that are out of date.

    An evaluation whose result is left out counts as unfinished.
    """
    known = graph.survey()
    to_base = {recipe.name for recipe in study.evals if recipe.metrics.against == BASE_ARM}
    results: dict[tuple[str, str, str], bool] = {}
    for step in graph.of_kind("judgments", *UNJUDGED, "comparison"):
        against = step.against
        if step.kind == "judgments" and step.eval in to_base:
            against = base_run(study) or BASE_ARM
        results[step.run, step.eval, against] = known[step.name].fresh

    def kept(run: RunMeasurements) -> RunMeasurements:
        evals = []
        for one in run.evals:
            against = "" if one.against in (None, "reference") else str(one.against)
            if results.get((run.name, one.eval, against)):
                evals.append(one)
        mine = [(name, fresh) for (owner, name, _), fresh in results.items() if owner == run.name]
        stale = dict.fromkeys(name for name, fresh in mine if not fresh)
        return dataclasses.replace(run, evals=tuple(evals), unfinished=tuple(stale))

    arms = {
        name: dataclasses.replace(arm, runs=tuple(map(kept, arm.runs)))
        for name, arm in measurements.arms.items()
    }
    return dataclasses.replace(measurements, arms=arms)


def compare_study(
    study: Study, graph: Graph, by: str, *, whole_level: bool = False, keep: bool = True
) -> tuple[Measurements, Comparison]:
    """Return what was measured, and the comparison of the arms, whose look is recorded.

    Args:
        by: the command, for the ledger.
        whole_level: whether each comparison is tested at the whole level, whatever was seen before.
        keep: False to write nothing but the ledger.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """
    measurements = of_study(read_measurements(measured_runs(study, graph)), study, graph)
    relabel = partial(relabelled_once, graph, keep=keep)
    findings = check_validity(study, measurements)
    make = partial(compare_arms, measurements, findings, study, relabel=relabel)
    whole = make() if whole_level else None
    ledger = ledger_of(study, graph, measurements, by)
    return measurements, looked(ledger, lambda weigh: whole or make(weigh=weigh))


def conclude(
    study: Study, graph: Graph, by: str = "study report", *, keep: bool = True
) -> Conclusion:
    """Compute the statistics and write the report; both steps are recorded as done where everything
    above them is.

    Statistics that are fresh are computed for the report, and not recorded again.

    Args:
        by: the command, for the ledger.
        keep: False to write nothing where the study's folder is read-only.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """

    def done(step: Step, output: Any, files: list[Path], started: float) -> None:
        if complete:
            seconds = round(time.monotonic() - started, 2)
            graph.finish(step, digest_of(output), files, seconds=seconds)

    started = time.monotonic()
    known = graph.survey()
    statistics, report = graph.steps["statistics"], graph.steps["report"]
    complete = all(known[name].fresh for name in statistics.upstream)
    measurements, comparison = compare_study(study, graph, by, keep=keep)
    folder = study_folder(study) / "report"
    if not keep:
        return Conclusion(comparison, folder, complete)
    record = graph.folder / "statistics" / "comparison.json"
    if not known[statistics.name].fresh:
        write_json(record, comparison.to_dict())
        done(statistics, comparison.to_dict(), [record], started)
    started = time.monotonic()
    scratch = folder.with_name(".report.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    banners = not_up_to_date(statistics.upstream, known)
    write_report(scratch, gather(study.name, measurements, comparison, study, banners))
    publish(scratch, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    done(report, [file.name for file in files], files, started)
    return Conclusion(comparison, folder, complete)


def relabelled_once(
    graph: Graph, rows: Sequence[TableRow], verdict_of: VerdictOf, *, keep: bool = True
) -> Relabelling | None:
    """Return what becomes of copies of a study's table: as it is kept beside its statistics where
    that is of this table and this code, else anew.

    Args:
        keep: whether to say that this is measured, and to keep it.
    """
    file = graph.folder / "statistics" / "relabelling.json"
    key = f"{graph.steps['statistics'].version} {table_hash(rows)}"
    with suppress(DataError):
        if file.is_file() and (known := read_object(file)).get("key") == key:
            value = known.get("relabelling")
            return Relabelling.from_dict(value) if value else None
    if keep:
        tested = count(sum(row.p_holm is not None for row in rows), "comparison")
        say(f"measuring how often this report would be wrong: copies of {tested}, relabelled ...")
    own = relabelled(rows, verdict_of)
    if keep:
        write_json(file, {"key": key, "relabelling": dataclasses.asdict(own) if own else None})
    return own


def not_up_to_date(names: Sequence[str], known: Mapping[str, Freshness]) -> list[str]:
    """Return the line that stands above a report while steps are missing or stale."""
    behind = [f"{name} ({known[name].state})" for name in names if not known[name].fresh]
    if not behind:
        return []
    return [f"Not up to date: {first_of(behind, 6)}. What follows is what was measured before."]
