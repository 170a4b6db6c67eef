"""The evaluation logs of a run, read from its folder: which samples an evaluation has, and whether
they add up to its result's numbers.

A stored judgment that belongs to other answers or another judge (the recipe was changed and run
again) is not counted: AlpacaEval's samples hold only current rows, MT-Bench's rows are chosen by
judge and answer. The counts of the result file are the check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError
from recipes_lib.core.json_files import DamagedFile, read_object, read_rows
from recipes_lib.eval_log import EvalLog, Measure, Sample
from recipes_lib.judging.outcomes import grade_sample, pair_sample
from recipes_lib.judging.store import stored_rows, text_hash

_SHARE = re.compile(
    r"(?:^|_)acc(?:$|_)|^exact_match|^em$|^mc[12]$|^pass@|^f1$|^contains$"
)  # metrics of lm-eval between 0 and 1
SUITE_TITLES = {"alpaca_eval": "AlpacaEval", "mt_bench": "MT-Bench", "lm_eval": "lm-eval"}


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
    suite = str(result.get("suite", ""))
    readers = {"alpaca_eval": _alpaca_eval, "mt_bench": _mt_bench, "lm_eval": _lm_eval}
    reader = _imported if result.get("measures") is not None else readers.get(suite)
    if reader is None:
        raise DataError(
            f"a result of an unknown suite: '{suite}'",
            "known: alpaca_eval, mt_bench, lm_eval",
            file=file,
        )
    measures = []
    try:
        for measure in reader(name, file, result):
            if (measure.key, measure.opponent) not in seen:
                seen.add((measure.key, measure.opponent))
                measures.append(measure)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"not a result of this version: {type(error).__name__} {error}",
            "evaluate the run again",
            file=file,
        ) from None
    return EvalLog(name, suite, result.get("against"), file, result, tuple(measures))


def read_lines(path: Path, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file as `json_files.read_rows` does; numbers that are not
    finite become None.

    Raises:
        DataError: a line before the end is damaged, with its number.
    """
    for row in read_rows(path, skip_damaged):
        yield {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }


def _against_file(folder: Path, stem: str, against: str | None) -> Path:
    """The file of one opponent: `<stem>.jsonl`, with the opponent in its name unless that is the
    reference.
    """
    return folder / (
        f"{stem}.jsonl" if against in (None, "reference") else f"{stem}.against-{against}.jsonl"
    )


def _alpaca_eval(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """Win rate, and the mean grade where it was asked for."""
    against = result["against"]
    pairs, grades = [], []
    for row in read_lines(_against_file(file.parent / "samples", "samples", against)):
        verdicts: dict[str, Mapping[str, Any]] = {
            verdict["order"]: verdict for verdict in row["verdicts"]
        }
        answer, opponent = row["answer"], row["opponent_answer"]
        known = {"category": row["category"], "input": row.get("instruction"), "answer": answer}
        pairs.append(
            pair_sample(
                row["question_id"],
                verdicts,
                lengths=(len(answer), len(opponent)),
                opponent=opponent,
                **known,
            )
        )
        if grade := verdicts.get("single"):
            grades.append(grade_sample(row["question_id"], grade, lengths=(len(answer),), **known))
    yield _pairs(name, "alpaca_eval", "AlpacaEval win rate", file, result, pairs)
    if grades:
        mean = result["mean_score"]
        yield Measure(
            name,
            "alpaca_eval",
            "grade",
            "AlpacaEval mean grade, 1-5",
            tuple(grades),
            file,
            unit="grade",
            reported=mean["estimate"],
            reported_n=mean["n"],
        )


def _mt_bench(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """Mean grade over all turns, and the win rate where there is an opponent."""
    folder = file.parent
    asked, answers = (
        _turns(folder / "samples" / f"{stem}.jsonl") for stem in ("question", "model_answer")
    )
    grades = {}
    for row in _judged(folder / "judgments.jsonl", result, "absolute"):
        key = _turn_key(row)
        answer = answers.get(key)
        if answer is None or text_hash(answer) == row["answer_hashes"][0]:
            known = {
                "category": row["meta"]["category"],
                "lengths": tuple(row["lengths"]),
                "input": asked.get(key),
                "answer": answer,
            }
            grades[key] = grade_sample(key[0], row, turn=key[1], **known)
    score = result["score"]
    graded = [one.value for one in grades.values() if one.value is not None]
    if len(graded) != score["n"] or (
        graded and abs(sum(graded) / len(graded) - score["estimate"]) > 1e-6
    ):
        raise DataError(
            f"its mean is over {score['n']} grades, the stored ones are {len(graded)}",
            "evaluate the run again: it asks nothing twice",
            file=file,
        )
    yield Measure(
        name,
        "mt_bench",
        "grade",
        "MT-Bench mean grade, 1-5",
        tuple(grades.values()),
        file,
        unit="grade",
        reported=score["estimate"],
        reported_n=score["n"],
    )
    if not result.get("pairs"):
        return
    against = result["against"]
    theirs = _turns(file.parents[3] / against / "evals" / name / "samples" / "model_answer.jsonl")
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in _judged(_against_file(folder, "judgments", against), result, "relative"):
        rows.setdefault(_turn_key(row), {})[row["order"]] = row
    pairs = []
    for key, verdicts in rows.items():
        one = next(iter(verdicts.values()))
        lengths = tuple(one["lengths"] if one["order"] == "AB" else one["lengths"][::-1])
        texts = {
            "input": asked.get(key),
            "answer": answers.get(key),
            "opponent": theirs.get(key, ""),
        }
        pairs.append(
            pair_sample(
                key[0],
                verdicts,
                turn=key[1],
                category=one["meta"]["category"],
                lengths=lengths,
                **texts,
            )
        )
    yield _pairs(name, "mt_bench", "MT-Bench win rate", file, result, pairs)


def _pairs(
    name: str,
    suite: str,
    label: str,
    file: Path,
    result: Mapping[str, Any],
    pairs: Sequence[Sample],
) -> Measure:
    """The win rate of a suite, its counts compared with the result's.

    Raises:
        DataError: they differ.
    """
    told: Mapping[str, Any] = result["pairs"]
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
    reported, n = told["score"]["estimate"], told["n"]
    return Measure(
        name,
        suite,
        "win_rate",
        label,
        tuple(pairs),
        file,
        result["against"],
        reported=reported,
        reported_n=n,
    )


def _judged(path: Path, result: Mapping[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """Yield the stored judgments of one kind that a result rests on; the store keeps those of
    earlier prompts and answers too.
    """
    keys = set(result.get("judgment_keys") or ())
    for row in stored_rows(path):
        mine = row["key"] in keys if keys else row["judge"] == result["judge"]["fingerprint"]
        if mine and row["kind"] == kind and not row["meta"].get("probe"):
            yield row


def _turn_key(row: Mapping[str, Any]) -> tuple[str, int]:
    """Question and turn of a stored judgment."""
    question, _, turn = row["question_id"].rpartition(":")
    return question, int(turn)


def _turns(path: Path) -> dict[tuple[str, int], str]:
    """Texts by question and turn, of FastChat's question or answer file."""
    return {
        (str(row["question_id"]), turn): text
        for row in read_lines(path)
        for turn, text in enumerate(
            row["turns"] if "turns" in row else row["choices"][0]["turns"], 1
        )
    }


def _lm_eval(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """One measure per task, metric and filter."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in result["tasks"]:
        task, metric, chosen = row["task"], row["metric"], row["filter"]
        if task not in samples:
            samples[task] = list(read_lines(file.parent / "samples" / f"samples_{task}.jsonl"))
        chosen_samples = (
            sample for sample in samples[task] if sample.get("filter", "none") == chosen
        )
        items = [one for sample in chosen_samples if (one := _scored(sample, metric, task))]
        _check_samples(file, task, row["n"], items)
        values = [item.value for item in items if item.value is not None]
        if values and abs(sum(values) / len(values) - row["value"]) > 1e-6:
            items = []  # the metric is no mean of its samples (perplexities): nothing to pair
        shown = metric if chosen == "none" else f"{metric}, {chosen}"
        # By its name, not by what one arm's items happen to be: an error of 0 or 1 per item is no
        # share.
        share = bool(_SHARE.search(metric)) and all(
            0 <= value <= 1 for value in (*values, row["value"])
        )
        direction = row.get("higher_is_better")
        key = metric if chosen == "none" else f"{metric},{chosen}"
        yield Measure(
            name,
            "lm_eval",
            key,
            f"{task} {shown}",
            tuple(items),
            file,
            task=task,
            higher_is_better=direction if isinstance(direction, bool) else None,
            unit="share" if share else "number",
            reported=row["value"],
            reported_n=row["n"],
        )


def _check_samples(file: Path, task: str, told: Any, items: Sequence[Sample]) -> None:
    """Compare the number of samples with the result's.

    Raises:
        DataError: a sample stands twice, or there are more or fewer of them.
    """
    if (different := len({item.key for item in items})) != len(items):
        raise DataError(
            f"{task}: {len(items)} samples of {different} items: some stand twice",
            "evaluate the run again",
            file=file,
        )
    if items and isinstance(told, int) and told != len(items):
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


def _imported(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """Measures of an imported evaluation: items.jsonl, described in `measurements`."""
    rows = list(read_lines(file.with_name("items.jsonl")))
    for told in result["measures"]:
        metric, task = told["metric"], told.get("task") or ""
        mine = (row for row in rows if row["metric"] == metric and (row.get("task") or "") == task)
        items = tuple(map(Sample.from_dict, mine))
        yield Measure(
            name,
            str(result["suite"]),
            metric,
            told["label"],
            items,
            file,
            told.get("opponent"),
            task,
            told.get("higher_is_better", True),
            told.get("unit", "share"),
            told.get("reported"),
            told.get("reported_n"),
        )
