"""The same thing under two names: adapters, answers and judgments of two arms, and
answers of another arm's weights.

Files are read only where cheap facts agree: equal sizes of adapters, equal verdicts or close
lengths of most items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.compare.findings import Finding, found
from recipes_lib.compare.measurements import ArmMeasurements
from recipes_lib.compare.validity.case import Case, metrics_of, pairs, run_place
from recipes_lib.core.fingerprints import folder_fingerprint
from recipes_lib.eval_files import stored_weights
from recipes_lib.eval_log import EvalLog

EDITED_COPY = 1.0


def check_artifacts(case: Case) -> Iterator[Finding]:
    """Yield what two arms share that must be each one's own."""
    for arm in case.arms.values():
        yield from _same_seeds(arm)
    for first, second in pairs(case.arms):
        one, other = case.arms[first], case.arms[second]
        shared = sorted({run.name for run in one.runs} & {run.name for run in other.runs})
        if shared:
            yield found("identical-runs", [f"runs/{name}" for name in shared], (first, second))
        folders = [{run.folder.resolve() for run in arm.runs} for arm in (one, other)]
        if not folders[0] & folders[1]:
            yield from _same_adapters(one, other)
            yield from _same_results(one, other)
            yield from _same_weights(one, other)


def _adapters(arm: ArmMeasurements) -> dict[Path, int]:
    """Folders of final weights with the bytes in them."""
    folders = (run.folder / name for run in arm.runs for name in ("adapter", "model"))
    sizes = {
        folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in folders
    }
    return {folder: size for folder, size in sizes.items() if size}


def _same_adapters(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Final weights that are the same bytes."""
    theirs = _adapters(other)
    for mine, size in _adapters(one).items():
        for twin, its_size in theirs.items():
            if its_size == size and folder_fingerprint(mine) == folder_fingerprint(twin):
                places, arms = [run_place(mine), run_place(twin)], (one.name, other.name)
                yield found("identical-adapters", places, arms, folder=mine.name)


def _same_seeds(arm: ArmMeasurements) -> Iterator[Finding]:
    """Trainings of one arm with several seeds that ended with the same weights."""
    folders = _adapters(arm) if len(arm.runs) > 1 else {}
    prints: dict[str, list[Path]] = {}
    for folder, size in folders.items():
        if list(folders.values()).count(size) > 1:
            prints.setdefault(folder_fingerprint(folder), []).append(folder)
    for same in (same for same in prints.values() if len(same) > 1):
        yield found("identical-seeds", map(run_place, same), (arm.name,), n=len(same))


def _same_results(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Answers or judgments of one evaluation that are the same texts, or nearly.

    What is compared are the rows that both have: a copy of which rows were dropped is a copy still.
    """
    theirs = {(log.eval, log.against): log for log in other.logs}
    for log in one.logs:
        twin = theirs.get((log.eval, log.against))
        if twin is None or log.suite == "lm_eval" or not _alike(log, twin):
            continue
        arms, metrics = (one.name, other.name), metrics_of((log, twin))
        places = [run_place(log.file.parent), run_place(twin.file.parent)]
        for code, texts in (("identical-answers", _answers), ("identical-judgments", _judgments)):
            mine, its = texts(log), texts(twin)
            both = [(mine[key], its[key]) for key in mine if key in its]
            if both and all(text == same for text, same in both):
                yield found(code, places, arms, metrics, eval=log.eval)
                break


def _alike(one: EvalLog, other: EvalLog) -> bool:
    """Whether two results could rest on the same answers or judgments, an edit here and there: of
    most items that both have the lengths are close, or the verdicts equal where no length is known.
    """
    for measure in one.measures:
        twin = next((twin for twin in other.measures if twin.metric == measure.metric), None)
        theirs = {item.key: item for item in twin.samples} if twin else {}
        both = [(item, theirs[item.key]) for item in measure.samples if item.key in theirs]
        if both:
            known = any(item.lengths for item, _ in both)
            close = sum(
                _close(item.lengths, its.lengths) if known else item.verdicts == its.verdicts
                for item, its in both
            )
            return close >= EDITED_COPY * len(both)
    return False


def _close(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the lengths of two answers differ by a quarter at most."""
    (mine, *_), (its, *_) = one or (0,), other or (0,)
    return 4 * abs(mine - its) <= max(mine, its)


def _answers(log: EvalLog) -> Mapping[Any, str]:
    """The answers by question, turn and draw, as far as they are known whole."""
    samples = (one for measure in log.measures for one in measure.samples)
    return {one.key: one.answer for one in samples if one.answer is not None and not one.shortened}


def _judgments(log: EvalLog) -> Mapping[Any, str]:
    """What the judge wrote, by metric, question, turn and draw; nothing of a judge that gives
    probabilities, and of rules.
    """
    if log.judge is not None and log.judge.mode == "logits":
        return {}
    return {
        (measure.metric, *one.key): "\n".join(raw or "" for raw in one.raws)
        for measure in log.measures
        for one in measure.samples
        if any(one.raws) and not one.by_rule
    }


def _fingerprints(arm: ArmMeasurements) -> set[str]:
    return {log.answers.fingerprint or "" for log in arm.logs} - {""}


def _same_weights(one: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Answers of two arms that the same weights gave, though the arms have weights of their own."""
    shared = _fingerprints(one) & _fingerprints(other)
    mine, theirs = (
        {folder_fingerprint(folder) for folder in _adapters(arm)} if shared else set()
        for arm in (one, other)
    )
    if shared and not mine & theirs:  # the same final weights are a finding of their own
        places = [
            f"{run_place(log.file)}: weights {str(log.answers.fingerprint)[:12]}"
            for log in (*one.logs, *other.logs)
            if str(log.answers.fingerprint) in shared
        ]
        # Two arms without weights of their own are one base model.
        code = "answers-of-another-arm" if mine or theirs else "identical-models"
        yield found(code, places, (one.name, other.name))
    for arm, twin in ((one, other), (other, one)):
        yield from _foreign_rows(arm, twin)
        yield from _former_opponent(arm, twin)


def _foreign_rows(arm: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Evaluations whose stored answers all come from the other arm's weights."""
    theirs = _fingerprints(other) - _fingerprints(arm)
    for log in arm.logs if theirs else ():
        file, models = stored_weights(log)
        own = str(log.answers.fingerprint)
        if own not in models and models & theirs:
            evidence = (
                f"{run_place(file)}: weights {min(models & theirs)[:12]}",
                f"{run_place(log.file)}: weights {own[:12]}",
            )
            words = {"eval": log.eval, "other": other.name}
            yield found("answers-of-another-arm/stored", evidence, (arm.name,), **words)


def _former_opponent(arm: ArmMeasurements, other: ArmMeasurements) -> Iterator[Finding]:
    """Verdicts against answers of a run that has other weights now."""
    runs = {run.name: run for run in other.runs}
    for log in (log for log in arm.logs if log.against in runs):
        told = log.opponent.fingerprint if log.opponent else None
        own = [one for one in runs[str(log.against)].evals if one.eval == log.eval]
        now = {weights for one in own if (weights := one.answers.fingerprint)}
        if told and now and told not in now:
            yield found(
                "answers-of-another-arm/opponent",
                (
                    f"{run_place(log.file)}: weights {str(told)[:12]}",
                    f"{run_place(own[0].file)}: weights {min(now)[:12]}",
                ),
                (arm.name, other.name),
                [measure.name for measure in log.measures if measure.opponent is not None],
                eval=log.eval,
                run=log.file.parents[2].name,
                against=log.against,
            )
