"""The same thing under two names: imported files, adapters, answers and judgments of two arms, and
answers of another arm's weights.

Files are read only where cheap facts agree: equal sizes of adapters, equal verdicts and lengths of
all items.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.compare.eval_files import read_lines
from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.settings import pairs, run_place
from recipes_lib.foreign.run import imported_files, same_rows
from recipes_lib.generation.fingerprints import folder_fingerprint
from recipes_lib.judging.store import text_hash

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import ArmMeasurements, Measurements, RunMeasurements
    from recipes_lib.eval_log import EvalLog

_ONE = (
    "they cannot be ranked as different: find out which arm it belongs to, and make the other's"
    " anew"
)


def check_artifacts(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield what two arms share that must be each one's own."""
    del study
    present = {name: arm for name, arm in measurements.arms.items() if arm.runs}
    for arm in present.values():
        yield from _same_seeds(arm)
    for first, second in pairs(present):
        one, other = present[first], present[second]
        yield from _same_runs(one, other)
        if {run.folder.resolve() for run in one.runs} & {
            run.folder.resolve() for run in other.runs
        }:
            continue
        yield from _same_files(one, other)
        yield from _same_adapters(one, other)
        yield from _same_results(one, other)
        yield from _same_weights(one, other)


def _found(
    code: str,
    what: str,
    evidence: Iterable[str],
    first: str,
    second: str,
    metrics: tuple[str, ...] = (),
) -> Finding:
    return Finding(code, "error", what, tuple(evidence), _ONE, (first, second), metrics)


def _same_runs(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """One run that stands for both arms."""
    shared = sorted({run.name for run in one.runs} & {run.name for run in other.runs})
    if shared:
        title = f"{one.name} and {other.name} are one run under two names"
        yield _found(
            "identical-runs", title, [f"runs/{name}" for name in shared], one.name, other.name
        )


def _same_files(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """One foreign file that both arms were imported from; it touches the metrics that
    came from it.
    """
    sources = {
        same_rows(source): (run, source)
        for run in other.runs
        for source in imported_files(run.state)
        if source.get("sha256")
    }
    for run in one.runs:
        for source in imported_files(run.state):
            twin = sources.get(same_rows(source))
            if twin is None or source.get("format") == "adapter-config":
                continue
            name, theirs = str(source["file"]), str(twin[1]["file"])
            shown = name if name == theirs else f"{name} and {theirs}"
            title = f"{one.name} and {other.name} were imported from the same file, {shown}"
            evidence = [
                f"sha256 {source['sha256']}",
                f"run {run.name}: {name}",
                f"run {twin[0].name}: {theirs}",
            ]
            metrics = _metrics_of(run, source["sha256"])
            if metrics or str(source.get("becomes", "")).startswith("metrics"):
                yield _found(
                    "identical-imported-file",
                    title,
                    evidence,
                    one.name,
                    other.name,
                    metrics or ("validation_loss",),
                )


def _metrics_of(run: RunMeasurements, sha256: str) -> tuple[str, ...]:
    """The metrics of the evaluations that a file went into."""
    mine = [
        result
        for result in run.evals
        if any(file["sha256"] == sha256 for file in result.result.get("imported") or ())
    ]
    return tuple(dict.fromkeys(measure.name for result in mine for measure in result.measures))


def _adapters(arm: ArmMeasurements) -> dict[Path, int]:
    """Folders of final weights with the bytes in them."""
    folders = (run.folder / name for run in arm.runs for name in ("adapter", "model"))
    sizes = {
        folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in folders
        if folder.is_dir()
    }
    return {folder: size for folder, size in sizes.items() if size}


def _same_adapters(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Final weights that are the same bytes."""
    theirs = _adapters(other)
    for mine, size in _adapters(one).items():
        for twin in (folder for folder, other_size in theirs.items() if other_size == size):
            if folder_fingerprint(mine) == folder_fingerprint(twin):
                title = f"{one.name} and {other.name} have the same {mine.name} under two names"
                yield _found(
                    "identical-adapters",
                    title,
                    [run_place(mine), run_place(twin)],
                    one.name,
                    other.name,
                )


def _same_seeds(arm: ArmMeasurements) -> Iterator[Finding]:
    """Trainings of one arm with several seeds that ended with the same weights: they are one
    training counted twice.
    """
    folders = _adapters(arm) if len(arm.runs) > 1 else {}
    prints: dict[str, list[Path]] = {}
    for folder, size in folders.items():
        if sum(other == size for other in folders.values()) > 1:
            prints.setdefault(folder_fingerprint(folder), []).append(folder)
    for same in (same for same in prints.values() if len(same) > 1):
        title = (
            f"{len(same)} trainings of {arm.name} ended with the same weights: one training is"
            f" counted {len(same)} times"
        )
        remedy = "did the seed reach the training? train the other seeds anew"
        yield Finding(
            "identical-seeds",
            "error",
            title,
            tuple(run_place(folder) for folder in same),
            remedy,
            (arm.name,),
        )


def _same_results(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Answers or judgments of one evaluation that are the same texts."""
    theirs = {(result.eval, result.against): result for run in other.runs for result in run.evals}
    for result in (result for run in one.runs for result in run.evals):
        twin = theirs.get((result.eval, result.against))
        if twin is None or result.suite == "lm_eval" or not _alike(result, twin):
            continue
        metrics = tuple(
            dict.fromkeys(measure.name for measure in (*result.measures, *twin.measures))
        )
        places = [run_place(result.file.parent), run_place(twin.file.parent)]
        mine = _texts(result, "answer")
        if mine is not None and mine == _texts(twin, "answer"):
            title = f"{one.name} and {other.name} gave the same answers in {result.eval}"
            yield _found("identical-answers", title, places, one.name, other.name, metrics)
        elif (mine := _texts(result, "raw")) is not None and mine == _texts(twin, "raw"):
            title = f"{one.name} and {other.name} have the same judgments in {result.eval}"
            yield _found("identical-judgments", title, places, one.name, other.name, metrics)


def _alike(one: EvalLog, other: EvalLog) -> bool:
    """Whether two results could rest on the same answers or judgments: all lengths are equal, or
    all verdicts where no length is known.
    """
    for measure in one.measures:
        twin = next((twin for twin in other.measures if twin.metric == measure.metric), None)
        if twin is not None and len(twin.samples) == len(measure.samples) > 0:
            theirs = {item.key: item for item in twin.samples}
            pairs_of_items = [(item, theirs.get(item.key)) for item in measure.samples]
            lengths = [
                (item.lengths[:1], match.lengths[:1] if match else None)
                for item, match in pairs_of_items
            ]
            if any(mine != their for mine, their in lengths):
                return False
            unknown = all(not mine for mine, _ in lengths)
            return not unknown or all(
                match is not None and item.verdicts == match.verdicts
                for item, match in pairs_of_items
            )
    return False


def _texts(result: EvalLog, field: str) -> str | None:
    """A hash of all answers, or of all that the judge wrote, of one result; None where there are
    none.
    """
    folder = result.file.parent
    rows = list(
        read_lines(folder / ("generations.jsonl" if field == "answer" else "judgments.jsonl"))
    )
    fingerprint = (result.result.get("answers") or {}).get("fingerprint")
    if field == "answer" and not result.result.get("imported") and fingerprint:
        rows = [row for row in rows if row.get("model") == fingerprint]
    kept = [
        [str(row.get("question_id")), str(row.get("turn") or row.get("order")), str(row[field])]
        for row in rows
        if row.get(field) is not None
    ]
    return text_hash(json.dumps(sorted(kept))) if kept else None


def _same_weights(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Answers of two arms that the same weights gave, though the arms have weights of their own;
    and answers of unknown weights.
    """
    if _fingerprints(one) & _fingerprints(other) and not _shared_adapter(one, other):
        for code, title, evidence in _lent(one, other):
            yield _found(code, title, evidence, one.name, other.name)
    for arm, twin in ((one, other), (other, one)):
        yield from _foreign_rows(arm, twin)
        yield from _former_opponent(arm, twin)


def _fingerprints(arm: ArmMeasurements) -> set[str]:
    found = (
        (result.result.get("answers") or {}).get("fingerprint")
        for run in arm.runs
        for result in run.evals
    )
    return {
        str(fingerprint)
        for fingerprint in found
        if fingerprint and not str(fingerprint).startswith("imported:")
    }


def _shared_adapter(one: ArmMeasurements, other: ArmMeasurements) -> bool:
    """Whether both have the same final weights, which is a finding of its own; two arms without any
    are one base model.
    """
    mine, theirs = (
        {folder_fingerprint(folder) for folder in _adapters(arm)} for arm in (one, other)
    )
    return bool(mine & theirs)


def _lent(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[tuple[str, str, list[str]]]:
    shared = sorted(_fingerprints(one) & _fingerprints(other))
    places = [
        f"{run_place(result.file)}: weights {fingerprint[:12]}"
        for arm in (one, other)
        for run in arm.runs
        for result in run.evals
        if (fingerprint := str((result.result.get("answers") or {}).get("fingerprint"))) in shared
    ]
    if _adapters(one) or _adapters(other):
        yield (
            "answers-of-another-arm",
            f"The same weights answered for {one.name} and for {other.name}",
            places,
        )
    else:
        yield "identical-models", f"{one.name} and {other.name} are the same model", places


def _foreign_rows(arm: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Evaluations whose stored answers all come from the other arm's weights."""
    theirs = _fingerprints(other) - _fingerprints(arm)
    for result in (result for run in arm.runs for result in run.evals):
        file = result.file.parent / "generations.jsonl"
        if not theirs or result.result.get("imported") or not file.is_file():
            continue
        stat = file.stat()
        models = _models_in(file, stat.st_size, stat.st_mtime_ns)
        own = str((result.result.get("answers") or {}).get("fingerprint"))
        if own not in models and models & theirs:
            title = (
                f"The answers of {arm.name} in {result.eval} were given by {other.name}'s weights"
            )
            weights = min(models & theirs)[:12]
            evidence = (
                f"{run_place(file)}: weights {weights}",
                f"{run_place(result.file)}: weights {own[:12]}",
            )
            remedy = "delete the file and evaluate the run again"
            yield Finding("answers-of-another-arm", "error", title, evidence, remedy, (arm.name,))


def _former_opponent(arm: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Verdicts against answers of a run that has other weights now: it was trained again, or
    another run has its name.
    """
    runs = {run.name: run for run in other.runs}
    for result in (result for run in arm.runs for result in run.evals if result.against in runs):
        told = (result.result.get("opponent") or {}).get("fingerprint")
        own = [one for one in runs[str(result.against)].evals if one.eval == result.eval]
        now = {
            one.result["answers"]["fingerprint"]
            for one in own
            if (one.result.get("answers") or {}).get("fingerprint")
        }
        if told and now and told not in now:
            title = (
                f"{arm.name} was judged in {result.eval} against answers that {other.name} does not"
                " give any more"
            )
            evidence = (
                f"{run_place(result.file)}: weights {str(told)[:12]}",
                f"{run_place(own[0].file)}: weights {min(now)[:12]}",
            )
            remedy = (
                f"judge it again: recipes eval EVAL {result.file.parents[2].name} --against"
                f" {result.against}"
            )
            metrics = tuple(
                measure.name for measure in result.measures if measure.opponent is not None
            )
            yield Finding(
                "answers-of-another-arm",
                "error",
                title,
                evidence,
                remedy,
                (arm.name, other.name),
                metrics,
            )


@lru_cache(maxsize=256)
def _models_in(file: Path, size: int, changed: int) -> frozenset[str]:
    """The weights that answers in a file are of, each file scanned once: in JSON no text holds an
    unescaped quote.
    """
    del size, changed
    return frozenset(
        found.decode("utf-8", "replace")
        for found in re.findall(rb'"model":\s*"([^"]*)"', file.read_bytes())
    )
