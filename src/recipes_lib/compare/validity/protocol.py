"""Whether the arms were asked the same things in the same way, and what is not there: evaluations,
trainings, files.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recipes_lib.compare.design import Arm, Study
from recipes_lib.compare.findings import Finding, found
from recipes_lib.compare.measurements import same_questions
from recipes_lib.compare.published import load_published
from recipes_lib.compare.validity.case import (
    Case,
    differing,
    metrics_of,
    pairs,
    run_place,
    settings_differ,
    told_apart,
)
from recipes_lib.core.project import shown_path
from recipes_lib.eval_log import EvalLog, Measure
from recipes_lib.training.resume_guard import flatten

# Parts of an eval recipe that say how fast or where it runs, not what is asked; the judge has a
# check of its own.
_FREE = (
    "name",
    "data.labels",
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
_HOW_FAST = ("batch_size", "model_args")  # the same, of another program's protocol
_SHOTS = ": few-shot"
_PRECISION = ("quantization", "quantization.load_in_4bit", "model.dtype")
Arms = tuple[str, str]
# What a check of two results gives: the evidence, and what the finding's texts name.
_Seen = tuple[Sequence[str], dict[str, str]]
_PairCheck = Callable[[Case, Arms, EvalLog, EvalLog], _Seen]


def check_protocol(case: Case) -> Iterator[Finding]:
    """Yield what differs between the evaluations of the arms, and which of them are of a subset."""
    evals: dict[tuple[str, str | None], dict[str, list[EvalLog]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name, log in case.logs:
        # Results against another arm are compared with each other, whichever arm that is.
        arm = log.against in case.measurements.arm_of_run
        evals[log.eval, "another arm" if arm else log.against][name].append(log)
    # What two arms differ in by the same evidence in several evaluations is one finding.
    alike: dict[Finding, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    checks: dict[str, _PairCheck] = {
        "protocol-differs": _settings_differ,
        "protocol-differs/texts": _texts_differ,
        "precision-of-answers": _precision_differs,
        "confound-versions/evaluations": _versions_differ,
        "code-differs/evaluations": _code_differs,
    }
    for by_arm in evals.values():
        for arms in pairs(by_arm):
            # Each seed of one arm with each of the other.
            every = list(itertools.product(*(by_arm[name] for name in arms)))
            for kind, check in checks.items():
                for logs in every:
                    evidence, words = check(case, arms, *logs)
                    if evidence:
                        finding = found(kind, evidence, arms, **words)
                        alike[finding].append((every[0][0].eval, metrics_of(logs)))
                        break
            yield from _questions_differ(arms, *every[0])
        yield from _subsets({name: logs[0] for name, logs in by_arm.items()})
        yield from _repeated([log for logs in by_arm.values() for log in logs])
    for finding, members in alike.items():
        metrics = dict.fromkeys(metric for _, its in members for metric in its)
        title = f"{finding.title} ({' and '.join(dict.fromkeys(name for name, _ in members))})"
        yield replace(finding, title=title, metrics=tuple(metrics))


def _settings_differ(case: Case, arms: Arms, one: EvalLog, other: EvalLog) -> _Seen:
    """Settings that both results know and that differ."""
    mine, theirs = _settings(one), _settings(other)
    by_factor = case.declares("data.prompt_format", "data")
    keys = [
        key
        for key in differing(mine, theirs)
        if key in mine
        and key in theirs
        and not (by_factor and key.startswith("answers.prompt_format"))
    ]
    named = (f"{key} ({mine[key]} and {theirs[key]})" if _SHOTS in key else key for key in keys[:3])
    return settings_differ(keys, arms, mine, theirs), {"keys": ", ".join(named)}


def _texts_differ(case: Case, arms: Arms, one: EvalLog, other: EvalLog) -> _Seen:
    """Items of one id that were about another question, or another answer of the opponent."""
    # Each against the other, or a seed of it, has no opponent in common.
    opponents = one.against == other.against
    theirs = {
        (measure.key, item.key): item for measure in other.measures for item in measure.samples
    }
    asked: set[str] = set()
    opposed: set[str] = set()
    for measure in one.measures:
        for item in measure.samples:
            twin = theirs.get((measure.key, item.key), item)
            if _differ(item.input, twin.input):
                asked.add(item.id)
            elif opponents and _differ(item.opponent, twin.opponent):
                opposed.add(item.id)
    evidence = [
        f"{what} differs for {len(ids)} ids, among them {min(ids)}"
        for what, ids in (
            ("the question", asked),
            (f"the answer of {one.against} that was judged against", opposed),
        )
        if ids
    ]
    places = [run_place(one.file), run_place(other.file)]
    return evidence + places if evidence else [], {}


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two texts are known and not the same; white space at the ends is no difference."""
    return one is not None and other is not None and one.strip() != other.strip()


def _settings(log: EvalLog) -> Mapping[str, Any]:
    """How an evaluation asked, by dotted key."""
    recipe = flatten(
        {key: value for key, value in log.recipe.items() if key not in ("judge", "thresholds")}
    )
    values = {key: value for key, value in recipe.items() if key not in _FREE}
    values |= flatten({"answers": {"decoding": log.answers.decoding}})
    values["answers.prompt_format_hash"] = log.answers.prompt_format_hash
    for task in log.tasks:
        name = f"{task.task}, {task.metric}"
        values[f"{name}{_SHOTS}"] = task.num_fewshot
        values[f"{name}: task version"] = task.version
    if log.tasks and all(task.num_fewshot is not None for task in log.tasks):
        values.pop("suite.num_fewshot", None)  # asked for, or the task's own: it is known
    told = {key: log.protocol[key] for key in log.protocol if key not in _HOW_FAST}
    values |= {f"protocol.{key}": value for key, value in told.items()}
    # In a result of ours a setting that is not there was left at its default.
    kept = ("suite.", "data.", "protocol.")
    known = {key: value for key, value in values.items() if value is not None}
    return known | {key: None for key in values if key.startswith(kept) and key not in known}


def _precision_differs(case: Case, arms: Arms, one: EvalLog, other: EvalLog) -> _Seen:
    """Answers given in other precisions, where precision is no factor."""
    if case.declares(*_PRECISION):
        return (), {}
    mine, theirs = (
        {"dtype": log.answers.dtype, "quantized": log.answers.quantized} for log in (one, other)
    )
    keys = [key for key in told_apart(mine, theirs) if None not in (mine[key], theirs[key])]
    return settings_differ(keys, arms, mine, theirs), {}


def _versions_differ(case: Case, arms: Arms, one: EvalLog, other: EvalLog) -> _Seen:
    """Libraries that both results recorded, in other versions."""
    del case
    keys = told_apart(one.libraries, other.libraries)
    return settings_differ(keys, arms, one.libraries, other.libraries), {}


def _code_differs(case: Case, arms: Arms, one: EvalLog, other: EvalLog) -> _Seen:
    """Commits that both results recorded."""
    del case
    commits = [str(log.git.get("commit") or "")[:12] for log in (one, other)]
    if not all(commits) or commits[0] == commits[1]:
        return (), {}
    return [f"{arm}: commit {commit}" for arm, commit in zip(arms, commits, strict=True)], {}


def _questions_differ(arms: Arms, one: EvalLog, other: EvalLog) -> Iterator[Finding]:
    """Questions that only one of the two was asked."""
    theirs = {measure.key: measure for measure in other.measures}
    for measure in one.measures:
        twin = theirs.get(measure.key)
        if twin is None or not measure.samples or not twin.samples:
            continue
        both = [{item.id for item in each.samples} for each in (measure, twin)]
        alone = (len(both[0] - both[1]), len(both[1] - both[0]))
        if any(alone):
            evidence = [
                f"{n} only {arm} ({run_place(each.file)})"
                for n, arm, each in zip(alone, arms, (measure, twin), strict=True)
            ]
            words = {"metric": measure.name, "n": len(both[0] & both[1])}
            yield found("questions-differ", evidence, arms, (measure.name,), **words)


def _repeated(logs: Sequence[EvalLog]) -> Iterator[Finding]:
    """Questions that one evaluation asks more than once; by metric, because tasks share ids."""
    measures: dict[str, list[Measure]] = defaultdict(list)
    for measure in (one for log in logs for one in log.measures):
        measures[measure.name].append(measure)
    again: dict[tuple[str, ...], tuple[int, list[str]]] = {}
    for name, mine in measures.items():
        first = same_questions(mine)
        lines = tuple(f"{one} is {other} again" for one, other in first.items() if one != other)
        if lines:
            asked = {item.id for one in mine for item in one.samples}
            again.setdefault(lines, (len(asked), []))[1].append(name)
    for lines, (total, metrics) in again.items():
        more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
        words = {"eval": logs[0].eval, "n": total - len(lines), "total": total}
        yield found("repeated-questions", [*lines[:5], *more], (), metrics, **words)


def _subsets(logs: Mapping[str, EvalLog]) -> Iterator[Finding]:
    """Results on some of the questions."""
    stamps: dict[str, list[str]] = defaultdict(list)
    for name, log in logs.items():
        if log.subset:
            stamps[log.subset].append(name)
    if stamps:
        evidence = [f"{', '.join(names)}: {stamp}" for stamp, names in stamps.items()]
        words = {"eval": next(iter(logs.values())).eval}
        yield found("subset", evidence, (), metrics_of(logs.values()), **words)


def check_presence(case: Case) -> Iterator[Finding]:
    """Yield evaluations that other arms have or that were not finished, trainings whose weights are
    lost, and arms without runs.
    """
    every = {log.eval for _, log in case.logs}
    opposing = {(log.eval, log.against) for _, log in case.logs}
    for name, arm in case.arms.items():
        for run in arm.runs:
            place = [run_place(run.folder)]
            begun = [
                one
                for one in run.unfinished
                if (one, run.name) not in opposing  # else its answers stood against another arm's
                or any((run.folder / "evals" / one).glob("judgments*.jsonl"))
            ]
            if begun:
                yield found("unfinished-evaluation", place, (name,), evals=", ".join(begun))
            missing = sorted(every - {log.eval for log in run.evals} - set(run.unfinished))
            if missing and run.evals:
                yield found("missing-evaluation", place, (name,), evals=", ".join(missing))
            # Logs of other programs may count epochs alone.
            done = [
                f"{max(reached)} {unit}s"
                for unit in ("step", "epoch")
                if (reached := [line[unit] for line in run.curves if line.get(unit) is not None])
            ]
            weights = any((run.folder / name).is_dir() for name in ("adapter", "model"))
            # Weights that were evaluated may be gone: their answers are there.
            answered = run.evals or run.unfinished or run.state.get("state") == "running"
            if done and not weights and not answered:
                told = f"{done[0]} in metrics.jsonl; no adapter/, model/ or evaluation"
                yield found("lost-weights", [*place, told], (name,))
    if case.study:
        for declared in case.study.arms:
            yield from _absent(case, case.study, declared)


def _absent(case: Case, study: Study, arm: Arm) -> Iterator[Finding]:
    """What a study declares of an arm and is not there."""
    place, runs = shown_path(study.path), case.arms[arm.name].runs if arm.name in case.arms else ()
    if arm.published_only:
        yield found("published-only", _published(study, arm.name), (arm.name,))
    if not arm.trained:
        return
    seeds, wanted = f"seeds {', '.join(map(str, arm.seeds))}", len(arm.seeds)
    if (n := len(runs)) < wanted:
        evidence = f"{seeds}; there: {', '.join(run.name for run in runs) or 'none'}"
        words = {"there": n, "wanted": wanted, "study": place}
        yield found("confound-missing-runs", [evidence], (arm.name,), (), **words)
    for name in dict.fromkeys(log.eval for run in runs for log in run.evals):
        logs = {run.name: [log for log in run.evals if log.eval == name] for run in runs}
        have = [run for run, mine in logs.items() if mine]
        if len(have) < n:
            metrics = metrics_of(log for mine in logs.values() for log in mine)
            evidence = f"{seeds}; evaluated: {', '.join(have)}"
            words = {"eval": name, "there": len(have), "wanted": wanted, "study": place}
            kind = "confound-missing-runs/evaluations"
            yield found(kind, [evidence], (arm.name,), metrics, **words)


def _published(study: Study, arm: str) -> list[str]:
    """The numbers that a publication has of an arm, each with its notes."""
    if study.published is None:
        return []
    published = load_published(study.published)
    lines = []
    for number in published.of(arm):
        if number.beside or number.notes:
            n = f" (n {number.n})" if number.n else ""
            notes = f": {'; '.join(number.notes)}" if number.notes else ""
            table = published.titles[number.table]
            lines.append(f"{table}, {number.label}: {number.shown}{n}{notes}")
    return lines or [f"{published.path.name} has no number of {arm}"]
