"""Whether the arms were asked the same things in the same way: questions, subsets, prompts,
decoding, few-shot, precision.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.validity.settings import differing, pairs, run_place, setting_text
from recipes_lib.training.resume_guard import flatten

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements
    from recipes_lib.eval_log import EvalLog

# Parts of an eval recipe that say how fast or where it runs, not what is asked; the judge has a
# check of its own.
_FREE = (
    "name",
    "generation.engine",
    "generation.batch_tokens",
    "generation.base_url",
    "generation.served_name",
    "generation.api_key_variable",
    "generation.concurrency",
    "generation.timeout_s",
    "generation.max_retries",
    "suite.batch_size",
    "metrics.against",
    "metrics.probe_pairs",
)


def check_protocol(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield what differs between the evaluations of the arms, and which of them are of a subset or
    missing.
    """
    evals: dict[tuple[str, str | None], dict[str, list[EvalLog]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for result in run.evals:
                evals[result.eval, _kind_of_opponent(result, measurements)][name].append(result)
    alike: list[tuple[str, Finding]] = []
    for found in evals.values():
        for first, second in pairs(found):
            every = list(
                itertools.product(found[first], found[second])
            )  # each seed of one arm with each of the other
            for check in (_asked, _texts, _precision):
                finding = next(
                    filter(None, (check(study, first, second, one, other) for one, other in every)),
                    None,
                )
                alike += [(found[first][0].eval, finding)] if finding else []
            yield from _questions(first, second, *every[0])
        yield from _subsets({name: results[0] for name, results in found.items()})
    yield from _merged(alike)
    yield from _absent(measurements)


def _merged(found: Sequence[tuple[str, Finding]]) -> Iterator[Finding]:
    """What two arms differ in by the same evidence in several evaluations is one finding."""
    groups: dict[Finding, list[tuple[str, Finding]]] = defaultdict(list)
    for name, finding in found:
        groups[replace(finding, metrics=())].append((name, finding))
    for finding, members in groups.items():
        metrics = tuple(dict.fromkeys(metric for _, member in members for metric in member.metrics))
        evals = " and ".join(dict.fromkeys(name for name, _ in members))
        yield replace(finding, title=f"{finding.title} ({evals})", metrics=metrics)


def _kind_of_opponent(result: EvalLog, measurements: Measurements) -> str | None:
    """Results against another arm are compared with each other, whichever arm that is."""
    return "another arm" if result.against in measurements.arm_of_run else result.against


def _asked(
    study: Study | None, first: str, second: str, one: EvalLog, other: EvalLog
) -> Finding | None:
    """Settings that both results know and that differ."""
    mine, theirs = _settings(one), _settings(other)
    keys = [key for key in differing(mine, theirs) if key in mine and key in theirs]
    factors = (
        ()
        if study is None
        else tuple(
            key for key in ("data.prompt_format", "data") if study.factor_of(key) is not None
        )
    )
    keys = [key for key in keys if not (factors and key.startswith("answers.prompt_format"))]
    if not keys:
        return None
    evidence = tuple(
        f"{key}: {first} {setting_text(mine[key])}, {second} {setting_text(theirs[key])}"
        for key in keys
    )
    title = f"{first} and {second} were not asked in the same way: {', '.join(keys[:3])}"
    return Finding(
        "protocol-differs",
        "error",
        title,
        evidence,
        "evaluate both with one eval recipe (recipes eval)",
        (first, second),
        _metrics(one, other),
    )


def _texts(
    study: Study | None, first: str, second: str, one: EvalLog, other: EvalLog
) -> Finding | None:
    """Items of one id that were about other texts: another question, or another answer of the
    opponent.
    """
    del study
    opponents = (
        one.against == other.against
    )  # each against the other, or a seed of it, has no opponent in common
    prompts = (
        not one.imported and not other.imported
    )  # a foreign file holds what the judge was shown
    theirs = {
        (measure.key, item.key): item for measure in other.measures for item in measure.samples
    }
    asked: set[str] = set()
    opposed: set[str] = set()
    for measure in one.measures:
        for item in measure.samples:
            twin = theirs.get((measure.key, item.key))
            if twin is None:
                continue
            if prompts and _differ(item.input, twin.input):
                asked.add(item.id)
            elif opponents and _differ(item.opponent, twin.opponent):
                opposed.add(item.id)
    found = {"the question": asked, f"the answer of {one.against} that was judged against": opposed}
    evidence = tuple(
        f"{what} differs for {len(ids)} ids, among them {sorted(ids)[0]}"
        for what, ids in found.items()
        if ids
    )
    if not evidence:
        return None
    title = (
        f"{first} and {second} were asked other questions under the same ids, or judged against"
        " other answers"
    )
    remedy = "evaluate both with one eval recipe (recipes eval), after the last change of its files"
    evidence += (run_place(one.file), run_place(other.file))
    return Finding(
        "protocol-differs", "error", title, evidence, remedy, (first, second), _metrics(one, other)
    )


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two texts are known and not the same; white space at the ends is no difference."""
    return one is not None and other is not None and one.strip() != other.strip()


def _settings(result: EvalLog) -> dict[str, Any]:
    """How an evaluation asked, by dotted key; what a foreign file does not tell is left out."""
    told = result.result
    answers: Mapping[str, Any] = told.get("answers") or {}
    values: dict[str, Any] = {}
    recipe = {
        key: value
        for key, value in (told.get("recipe") or {}).items()
        if key not in ("judge", "thresholds")
    }
    values |= {key: value for key, value in flatten(recipe).items() if key not in _FREE}
    values |= {
        f"answers.{key}": value
        for key, value in flatten({"decoding": answers.get("decoding")}).items()
    }
    values["answers.prompt_format_hash"] = answers.get("prompt_format_hash")
    for task in told.get("tasks") or ():
        name = f"{task['task']}, {task['metric']}"
        values |= {
            f"{name}: few-shot": task.get("num_fewshot"),
            f"{name}: task version": task.get("version"),
        }
    values |= {
        f"protocol.{key}": value
        for key, value in (told.get("protocol") or {}).items()
        if key not in ("batch_size", "model_args")
    }
    known = {key: value for key, value in values.items() if value is not None}
    if not told.get("imported"):
        known |= {
            key: None
            for key in values
            if key.startswith(("suite.", "data.", "protocol.")) and key not in known
        }
    return known


def _precision(
    study: Study | None, first: str, second: str, one: EvalLog, other: EvalLog
) -> Finding | None:
    """Answers given in other precisions, where precision is no factor."""
    if study is not None and any(
        study.factor_of(key) for key in ("quantization", "quantization.load_in_4bit", "model.dtype")
    ):
        return None
    sides = [result.result.get("answers") or {} for result in (one, other)]
    evidence = tuple(
        f"{key}: {first} {setting_text(sides[0][key])}, {second} {setting_text(sides[1][key])}"
        for key in ("dtype", "quantized")
        if all(side.get(key) is not None for side in sides) and sides[0][key] != sides[1][key]
    )
    if not evidence:
        return None
    title = f"{first} and {second} answered in different precisions"
    remedy = "part of the difference may be the precision: answer with both in the same one"
    return Finding(
        "precision-of-answers",
        "warning",
        title,
        evidence,
        remedy,
        (first, second),
        _metrics(one, other),
    )


def _questions(first: str, second: str, one: EvalLog, other: EvalLog) -> Iterator[Finding]:
    """Questions that only one of the two was asked."""
    theirs = {measure.key: measure for measure in other.measures}
    for measure in one.measures:
        twin = theirs.get(measure.key)
        if twin is None or not measure.samples or not twin.samples:
            continue
        mine, other_items = (
            {item.id for item in items} for items in (measure.samples, twin.samples)
        )
        shared = len(mine & other_items)
        alone = (len(mine - other_items), len(other_items - mine))
        if any(alone):
            title = (
                f"{first} and {second} were asked different questions in {measure.name}: {shared}"
                " are the same"
            )
            evidence = (
                f"{alone[0]} only {first} ({run_place(measure.file)})",
                f"{alone[1]} only {second} ({run_place(twin.file)})",
            )
            remedy = "only the shared ones are compared; evaluate both on one question set"
            yield Finding(
                "questions-differ",
                "warning",
                title,
                evidence,
                remedy,
                (first, second),
                (measure.name,),
            )


def _subsets(found: Mapping[str, EvalLog]) -> Iterator[Finding]:
    """Results on some of the questions."""
    stamps: dict[str, list[str]] = defaultdict(list)
    for name, result in found.items():
        if result.result.get("subset"):
            stamps[str(result.result["subset"])].append(name)
    if stamps:
        one = next(iter(found.values()))
        evidence = tuple(f"{', '.join(names)}: {stamp}" for stamp, names in stamps.items())
        metrics = tuple(
            dict.fromkeys(measure.name for result in found.values() for measure in result.measures)
        )
        title = f"{one.eval} is a subset of its questions"
        yield Finding(
            "subset",
            "warning",
            title,
            evidence,
            "evaluate all of them: no limit, no max_questions",
            (),
            metrics,
        )


def _absent(measurements: Measurements) -> Iterator[Finding]:
    """Evaluations that other arms have and this one has not, or that were begun and not
    finished.
    """
    every = {
        result.eval
        for arm in measurements.arms.values()
        for run in arm.runs
        for result in run.evals
    }
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            if run.unfinished:
                title = f"{name} has evaluations without a result: {', '.join(run.unfinished)}"
                yield Finding(
                    "unfinished-evaluation",
                    "warning",
                    title,
                    (run_place(run.folder),),
                    "run the same command again",
                    (name,),
                )
            missing = sorted(every - {result.eval for result in run.evals} - set(run.unfinished))
            if missing and run.evals:
                title = f"{name} was not evaluated with {', '.join(missing)}"
                yield Finding(
                    "missing-evaluation",
                    "note",
                    title,
                    (run_place(run.folder),),
                    "recipes eval EVAL RUN",
                    (name,),
                )


def _metrics(one: EvalLog, other: EvalLog) -> tuple[str, ...]:
    return tuple(dict.fromkeys(measure.name for measure in (*one.measures, *other.measures)))
