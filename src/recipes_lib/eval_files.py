"""The evaluation logs of a run on disk: result.json with the header, items.jsonl with the samples,
whose counts must be those of the header. lm-eval results that were imported are read from lm-eval's
own samples.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes_lib.core.atomic_files import write_json, write_text
from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import DamagedFile, object_or_none, read_object, read_rows
from recipes_lib.eval_log import REFERENCE, EvalLog, Measure, Sample, TaskScore

_SHARE = re.compile(
    r"(?:^|_)acc(?:$|_)|^exact_match|^em$|^mc[12]$|^pass@|^f1$|^contains$"
)  # metrics of lm-eval between 0 and 1


def read_evals(
    run: Path, report: Callable[[DamagedFile], None] | None = None
) -> tuple[tuple[EvalLog, ...], tuple[str, ...]]:
    """Return a run's finished evaluations, and the names of those that were begun and have no
    result.

    Args:
        run: its folder.
        report: is told of each result that is damaged, which is then left out; None to raise the
            error.

    Raises:
        DataError: a file is damaged, or a result's numbers do not agree with its items.
    """
    folder = run / "evals"
    results: list[EvalLog] = []
    unfinished = []
    for one in (
        sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    ):
        files = sorted(
            one.glob("result*.json"), key=lambda path: (path.name != "result.json", path.name)
        )
        if not files and any(one.glob("*.jsonl")):
            unfinished.append(one.name)
        seen: set[tuple[Any, ...]] = set()
        for file in files:
            try:
                results.append(_read_result(one.name, file, seen))
            except DamagedFile as error:
                if report is None:
                    raise
                report(error)
                unfinished.append(one.name)
    return tuple(results), tuple(unfinished)


def _read_result(name: str, file: Path, seen: set[tuple[Any, ...]]) -> EvalLog:
    """One result file; a grade that stands in several of them (one per opponent) is taken from the
    first.
    """
    result = read_object(file)
    if "suite" in result and "measures" not in result and result["suite"] != "lm_eval":
        raise DataError(
            "is of an earlier version, which kept its items in other files",
            "evaluate the run again: its answers and judgments count, nothing is asked twice",
            file=file,
        )
    measures = []
    try:
        reader = _lm_eval if result["suite"] == "lm_eval" and "measures" not in result else _items
        for measure in with_groups(list(reader(name, file, result))):
            if (measure.key, measure.opponent) not in seen:
                seen.add((measure.key, measure.opponent))
                measures.append(measure)
        return EvalLog.from_dict(result, name, file, measures)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"not a result of this version: {type(error).__name__} {error}",
            "evaluate the run again",
            file=file,
        ) from None


def log_file(run: Path, name: str, against: str | None) -> Path:
    """Return where the result of an evaluation against an opponent lies in a run's folder."""
    suffix = "" if against in (None, REFERENCE) else f".against-{against}"
    return run / "evals" / name / f"result{suffix}.json"


def write_log(log: EvalLog) -> None:
    """Write a log: first its samples, then result.json, which makes it one.

    A result of other settings that lies there is kept, in `earlier/<its key>/` beside it.
    """
    before = object_or_none(log.file) or {}
    if before and before.get("key", "") != log.key:
        kept = log.file.parent / "earlier" / (str(before.get("key") or "")[:12] or "no-key")
        kept.mkdir(parents=True, exist_ok=True)
        for file in (log.file, _items_file(log.file)):
            if file.is_file():
                file.replace(kept / file.name)
    rows = (
        sample.to_dict(measure.metric, measure.task)
        for measure in log.measures
        for sample in measure.samples
    )
    write_lines(_items_file(log.file), rows)
    write_json(log.file, log.to_dict())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _items_file(result: Path) -> Path:
    return result.with_name(result.name.replace("result", "items", 1) + "l")


def stored_weights(log: EvalLog) -> tuple[Path, frozenset[str]]:
    """Return the file of answers beside a log, and the weights whose answers it holds."""
    file = log.file.with_name("generations.jsonl")
    if not file.is_file():
        return file, frozenset()
    stat = file.stat()
    return file, _models_in(file, stat.st_size, stat.st_mtime_ns)


def stored_answers(log: EvalLog) -> dict[tuple[str, int, int], tuple[str, bool | None]]:
    """Return the answers behind a log with whether each was cut, by question, turn and draw: those
    of its weights and decoding that are stored beside it, else those of its samples, of which it is
    not known.
    """
    found: dict[tuple[str, int, int], tuple[str, bool | None]] = {}
    decoding = log.answers.decoding
    for row in read_lines(log.file.with_name("generations.jsonl"), skip_damaged=True):
        if row.get("model") == log.answers.fingerprint and (
            decoding is None or row.get("decoding") in (None, decoding)
        ):
            key = str(row["question_id"]), int(row["turn"]), int(row.get("draw") or 1)
            found[key] = str(row["answer"]), row.get("finish_reason") not in (None, "stop")
    samples = (one for measure in log.measures[:1] for one in measure.samples)
    return found or {
        one.key: (one.answer, None)
        for one in samples
        if one.answer is not None and not one.shortened
    }


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


def read_lines(path: Path, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
    """Return the objects of a JSON-lines file as `json_files.read_rows` does; numbers that are not
    finite become None.

    Raises:
        DataError: a line before the end is damaged, with its number.
    """
    return map(finite, read_rows(path, skip_damaged))


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with None for numbers that are not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _items(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """The measures that result.json names, with their samples from items.jsonl."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    for row in read_lines(_items_file(file)):
        key = row["metric"], row.get("task") or ""
        samples.setdefault(key, []).append(Sample.from_dict(row))
    for told in result["measures"]:
        metric, task = told["metric"], told.get("task") or ""
        measure = Measure(
            name,
            str(result["suite"]),
            metric,
            told["label"],
            tuple(samples.get((metric, task), ())),
            file,
            told.get("opponent"),
            task,
            told.get("higher_is_better", True),
            told.get("unit", "share"),
            told.get("reported"),
            told.get("reported_n"),
            told.get("instead_of", ""),
            tuple(told.get("parts") or ()),
        )
        if "written" in result:  # of ours, not of an import
            _check_measure(measure, result)
        yield measure


def _check_measure(measure: Measure, result: Mapping[str, Any]) -> None:
    """Compare the samples of a measure with the numbers of its result."""
    file, samples = measure.file, measure.samples
    if measure.suite == "lm_eval":
        _check_samples(file, measure.task, measure.reported_n if samples else None, samples)
    elif measure.metric == "win_rate":
        _check_counts(file, result["pairs"], samples)
    elif measure.metric == "grade":
        _check_mean(file, measure.reported_n, measure.reported, samples)
    else:
        told = result["rows" if measure.suite == "heldout_loss" else measure.metric]["n"]
        _check_samples(file, measure.label, told, samples)


def with_groups(measures: Sequence[Measure]) -> Iterator[Measure]:
    """Yield measures, a group of lm-eval tasks with the samples of its tasks: one mean that can be
    tested.

    The items weigh as in the value that lm-eval reported, all alike or all tasks alike; a group of
    which neither gives that value keeps it alone.
    """
    for group in measures:
        tasks = [
            one
            for one in measures
            if one.task in group.parts and one.metric == group.metric and not one.parts
        ]
        sizes = [len(one.samples) for one in tasks]
        if not tasks or not all(sizes):
            yield group
            continue
        for weights in ([1.0] * len(tasks), [sum(sizes) / len(tasks) / size for size in sizes]):
            samples = tuple(
                replace(sample, id=f"{one.task}/{sample.id}", value=(sample.value or 0.0) * weight)
                for one, weight in zip(tasks, weights, strict=True)
                for sample in one.samples
            )
            mean = sum(sample.value or 0.0 for sample in samples) / len(samples)
            if group.reported is not None and abs(mean - group.reported) <= 1e-6:
                yield replace(group, samples=samples)
                break
        else:
            yield group


def _check_counts(file: Path, told: Mapping[str, Any], pairs: Sequence[Sample]) -> None:
    """Compare the outcomes of comparisons with the result's counts."""
    counts = {
        outcome: sum(one.outcome == outcome for one in pairs)
        for outcome in ("win", "loss", "tie", "unresolved")
    }
    if shown := ", ".join(
        f"{word} {told[word]} and {n}" for word, n in counts.items() if told[word] != n
    ):
        raise DataError(
            f"its counts differ from the stored judgments: {shown}",
            "evaluate the run again: it asks nothing twice",
            file=file,
        )


def _check_mean(file: Path, n: Any, mean: Any, grades: Sequence[Sample]) -> None:
    """Compare grades with the result's mean."""
    graded = [one.value for one in grades if one.value is not None]
    if len(graded) != n or (graded and abs(sum(graded) / len(graded) - mean) > 1e-6):
        raise DataError(
            f"its mean is over {n} grades, the stored ones are {len(graded)}",
            "evaluate the run again: it asks nothing twice",
            file=file,
        )


def _lm_eval(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    def samples_of(task: str) -> Iterator[dict[str, Any]]:
        return read_lines(file.parent / "samples" / f"samples_{task}.jsonl")

    tasks = list(map(TaskScore.from_dict, result["tasks"]))
    yield from lm_eval_measures(name, file, tasks, samples_of)


def lm_eval_measures(
    name: str,
    file: Path,
    tasks: Sequence[TaskScore],
    samples_of: Callable[[str], Iterable[Mapping[str, Any]]],
) -> Iterator[Measure]:
    """Yield one measure per task, metric and filter.

    Args:
        tasks: the rows of the result's table.
        samples_of: gives the samples of a task as lm-eval writes them.

    Raises:
        DataError: a sample stands twice, or there are more or fewer than the table says.
    """
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for row in tasks:
        task, metric, value = row.task, row.metric, row.value
        if task not in samples:
            samples[task] = list(samples_of(task))
        chosen_samples = (
            sample for sample in samples[task] if sample.get("filter", "none") == row.filter
        )
        items = [one for sample in chosen_samples if (one := _scored(sample, metric, task))]
        _check_samples(file, task, row.n if items else None, items)
        values = [item.value for item in items if item.value is not None]
        if values and (value is None or abs(sum(values) / len(values) - value) > 1e-6):
            items = []  # the metric is no mean of its samples (perplexities): nothing to pair
        # By its name, not by what one arm's items happen to be: an error of 0 or 1 per item is no
        # share.
        share = bool(_SHARE.search(metric)) and all(
            0 <= one <= 1 for one in (*values, value) if one is not None
        )
        yield Measure(
            name,
            "lm_eval",
            metric if row.filter == "none" else f"{metric},{row.filter}",
            f"{task} {row.shown}",
            tuple(items),
            file,
            task=task,
            higher_is_better=row.higher_is_better,
            unit="share" if share else "number",
            reported=value,
            reported_n=row.n,
            parts=tuple(row.parts),
        )


def _check_samples(file: Path, task: str, told: Any, items: Sequence[Sample]) -> None:
    """Compare the number of samples with the result's."""
    if (different := len({item.key for item in items})) != len(items):
        raise DataError(
            f"{task}: {len(items)} samples of {different} items: some stand twice",
            "evaluate the run again",
            file=file,
        )
    if isinstance(told, int) and told != len(items):
        raise DataError(
            f"{task}: its n is {told}, and there are {len(items)} samples",
            "evaluate the run again",
            file=file,
        )


def _scored(sample: Mapping[str, Any], metric: str, task: str) -> Sample | None:
    value = sample.get(metric)
    if not isinstance(value, int | float | bool):
        return None
    outcome = {1.0: "right", 0.0: "wrong"}.get(float(value), "scored")
    doc = sample.get("doc") or {}
    category = str(doc.get("subject") or doc.get("category") or task)
    return Sample(
        f"{sample['doc_id']}:{sample.get('doc_hash', '')[:12]}", 1, category, float(value), outcome
    )
