"""Reading the files of one evaluation: which items it has, what each got, and whether they add up to the numbers in its result.

A stored judgment that belongs to other answers or another judge (the recipe was changed and run again) is not counted: AlpacaEval's
samples hold only current rows, MT-Bench's rows are chosen by judge and answer. The counts of the result file are the check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.compare.measurements import EvalResult, Item, Measure
from recipes_lib.errors import DataError
from recipes_lib.json_files import DamagedFile, read_object, read_rows
from recipes_lib.judging.outcomes import SCORE, ItemOutcome, item_outcome
from recipes_lib.judging.store import read_rows as stored_rows
from recipes_lib.judging.store import text_hash

_SHARE = re.compile(r"(?:^|_)acc(?:$|_)|^exact_match|^em$|^mc[12]$|^pass@|^f1$|^contains$")  # metrics of lm-eval between 0 and 1
SUITE_TITLES = {"alpaca_eval": "AlpacaEval", "mt_bench": "MT-Bench", "lm_eval": "lm-eval"}


def read_evals(run: Path, report: Callable[[DamagedFile], None] | None = None) -> tuple[tuple[EvalResult, ...], tuple[str, ...]]:
    """Return a run's finished evaluations, and the names of those that were begun and have no result.

    Args:
        run: its folder.
        report: is told of each result that is damaged, which is then left out; None to raise the error.

    Raises:
        DataError: a file is damaged, or a result's numbers do not agree with its items.
    """
    folder = run / "evals"
    results: list[EvalResult] = []
    unfinished = []
    for one in sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []:
        files = sorted(one.glob("result*.json"), key=lambda path: (path.name != "result.json", path.name))
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


def _read_result(name: str, file: Path, seen: set[tuple[Any, ...]]) -> EvalResult:
    """One result file; a grade that stands in several of them (one per opponent) is taken from the first."""
    result = read_object(file)
    suite = str(result.get("suite", ""))
    readers = {"alpaca_eval": _alpaca_eval, "mt_bench": _mt_bench, "lm_eval": _lm_eval}
    reader = _imported if result.get("measures") is not None else readers.get(suite)
    if reader is None:
        raise DataError(f"a result of an unknown suite: '{suite}'", "known: alpaca_eval, mt_bench, lm_eval", file=file)
    measures = []
    try:
        for measure in reader(name, file, result):
            if (measure.key, measure.opponent) not in seen:
                seen.add((measure.key, measure.opponent))
                measures.append(measure)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"not a result of this version: {type(error).__name__} {error}", "evaluate the run again", file=file) from None
    return EvalResult(name, suite, result.get("against"), file, result, tuple(measures))


def read_lines(path: Path, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file as `json_files.read_rows` does; numbers that are not finite become None.

    Raises:
        DataError: a line before the end is damaged, with its number.
    """
    for row in read_rows(path, skip_damaged):
        yield {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def against_file(folder: Path, stem: str, against: str | None) -> Path:
    """Return the file of one opponent: `<stem>.jsonl`, with the opponent in its name unless that is the reference."""
    return folder / (f"{stem}.jsonl" if against in (None, "reference") else f"{stem}.against-{against}.jsonl")


def _alpaca_eval(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """Win rate, and the mean grade where it was asked for."""
    against = result["against"]
    rows = list(read_lines(against_file(file.parent / "samples", "samples", against)))
    pairs, grades = [], []
    for row in rows:
        verdicts: dict[str, Mapping[str, Any]] = {verdict["order"]: verdict for verdict in row["verdicts"]}
        outcome = item_outcome(row["question_id"], verdicts)
        lengths = (len(row["answer"]), len(row["opponent_answer"]))
        asked, opposed = (_same_text(row.get(name)) for name in ("instruction", "opponent_answer"))
        pairs.append(_pair(row["question_id"], 1, row["category"], outcome, lengths, asked, opposed))
        if grade := verdicts.get("single"):
            grades.append(_grade(row["question_id"], 1, row["category"], grade, lengths[:1], asked))
    _check_counts(file, result["pairs"], pairs)
    title = "AlpacaEval win rate"
    reported, n = result["pairs"]["score"]["estimate"], result["pairs"]["n"]
    yield Measure(name, "alpaca_eval", "win_rate", title, tuple(pairs), file, against, reported=reported, reported_n=n)
    if grades:
        mean = result["mean_score"]
        yield Measure(
            name, "alpaca_eval", "grade", "AlpacaEval mean grade, 1-5", tuple(grades), file, unit="grade",
            reported=mean["estimate"], reported_n=mean["n"],
        )  # fmt: skip


def _mt_bench(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """Mean grade over all turns, and the win rate where there is an opponent."""
    against = result["against"]
    current = _answer_hashes(file.parent / "samples" / "model_answer.jsonl")
    asked = _asked_turns(file.parent / "samples" / "question.jsonl")
    grades = {}
    for row in judged_rows(file.parent / "judgments.jsonl", result, "absolute"):
        question, _, turn = row["question_id"].rpartition(":")
        if current.get((question, int(turn)), row["answer_hashes"][0]) == row["answer_hashes"][0]:
            grades[question, int(turn)] = _grade(
                question, int(turn), row["meta"]["category"], row, tuple(row["lengths"]), asked.get(question, "")
            )
    score = result["score"]
    items = tuple(grades.values())
    graded = [item.value for item in items if item.value is not None]
    if len(graded) != score["n"] or (graded and abs(sum(graded) / len(graded) - score["estimate"]) > 1e-6):
        raise DataError(
            f"its mean is over {score['n']} grades, the stored ones are {len(graded)}", "evaluate the run again: it asks nothing twice",
            file=file,
        )  # fmt: skip
    yield Measure(
        name, "mt_bench", "grade", "MT-Bench mean grade, 1-5", items, file, unit="grade", reported=score["estimate"], reported_n=score["n"]
    )
    if result.get("pairs"):
        yield _mt_bench_pairs(name, file, result, against)


def judged_rows(path: Path, result: Mapping[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    """Yield the stored judgments of one kind that a result rests on; the store keeps those of earlier prompts and answers too."""
    keys = set(result.get("judgment_keys") or ())
    for row in stored_rows(path):
        mine = row["key"] in keys if keys else row["judge"] == result["judge"]["fingerprint"]
        if mine and row["kind"] == kind and not row["meta"].get("probe"):
            yield row


def _mt_bench_pairs(name: str, file: Path, result: Mapping[str, Any], against: str) -> Measure:
    """The comparison of each turn with an opponent's."""
    rows: dict[str, dict[str, Any]] = {}
    for row in judged_rows(against_file(file.parent, "judgments", against), result, "relative"):
        rows.setdefault(row["question_id"], {})[row["order"]] = row
    asked = _asked_turns(file.parent / "samples" / "question.jsonl")
    items = []
    for key, verdicts in rows.items():
        question, _, turn = key.rpartition(":")
        any_row = next(iter(verdicts.values()))
        lengths = any_row["lengths"] if any_row["order"] == "AB" else any_row["lengths"][::-1]
        outcome = item_outcome(key, verdicts)
        items.append(_pair(question, int(turn), any_row["meta"]["category"], outcome, tuple(lengths), asked.get(question, "")))
    _check_counts(file, result["pairs"], items)
    reported, n = result["pairs"]["score"]["estimate"], result["pairs"]["n"]
    return Measure(name, "mt_bench", "win_rate", "MT-Bench win rate", tuple(items), file, against, reported=reported, reported_n=n)


def _answer_hashes(path: Path) -> dict[tuple[str, int], str]:
    """Hash of each current answer by question and turn."""
    return {
        (str(row["question_id"]), turn): text_hash(text)
        for row in read_lines(path)
        for turn, text in enumerate(row["choices"][0]["turns"], 1)
    }


def _asked_turns(path: Path) -> dict[str, str]:
    """Hash of the turns of each question."""
    return {str(row["question_id"]): _same_text("\n".join(map(str, row["turns"]))) for row in read_lines(path)} if path.is_file() else {}


def _same_text(text: object) -> str:
    """A short hash that tells texts apart; white space at the ends is no difference. Empty where there is no text."""
    return text_hash(text.strip())[:16] if isinstance(text, str) else ""


def _pair(question: str, turn: int, category: str, outcome: ItemOutcome, lengths: tuple[int, ...], asked: str, opposed: str = "") -> Item:
    said = (outcome.first, outcome.second)
    value = SCORE.get(outcome.outcome)
    return Item(question, turn, category, value, outcome.outcome, said, outcome.by_rule, lengths, asked, opposed)


def _grade(question: str, turn: int, category: str, row: Mapping[str, Any], lengths: tuple[int, ...], asked: str) -> Item:
    ok = row["status"] == "ok"
    said = (str(row["value"]) if ok else str(row["status"]),)
    value, by_rule = float(row["value"]) if ok else None, row.get("source") == "rule"
    return Item(question, turn, category, value, "graded" if ok else "unresolved", said, by_rule, lengths, asked)


def _check_counts(file: Path, pairs: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Compare a result's counts with its items'.

    Raises:
        DataError: they differ.
    """
    found = {outcome: sum(item.outcome == outcome for item in items) for outcome in ("win", "loss", "tie", "unresolved")}
    told = {outcome: pairs[outcome] for outcome in found}
    if told != found:
        shown = ", ".join(f"{name} {told[name]} and {found[name]}" for name in found if told[name] != found[name])
        raise DataError(f"its counts differ from the stored judgments: {shown}", "evaluate the run again: it asks nothing twice", file=file)


def _lm_eval(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """One measure per task, metric and filter."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in result["tasks"]:
        task, metric, chosen = row["task"], row["metric"], row["filter"]
        if task not in samples:
            samples[task] = list(read_lines(file.parent / "samples" / f"samples_{task}.jsonl"))
        chosen_samples = (sample for sample in samples[task] if sample.get("filter", "none") == chosen)
        items = [item for sample in chosen_samples if (item := _sample_item(sample, metric, task))]
        _check_samples(file, task, row["n"], items)
        values = [item.value for item in items if item.value is not None]
        if values and abs(sum(values) / len(values) - row["value"]) > 1e-6:
            items = []  # the metric is no mean of its samples (perplexities): nothing to pair
        shown = metric if chosen == "none" else f"{metric}, {chosen}"
        # By its name, not by what one arm's items happen to be: an error of 0 or 1 per item is no share.
        share = bool(_SHARE.search(metric)) and all(0 <= value <= 1 for value in (*values, row["value"]))
        direction = row.get("higher_is_better")
        key = metric if chosen == "none" else f"{metric},{chosen}"
        yield Measure(
            name, "lm_eval", key, f"{task} {shown}", tuple(items), file, task=task,
            higher_is_better=direction if isinstance(direction, bool) else None, unit="share" if share else "number",
            reported=row["value"], reported_n=row["n"],
        )  # fmt: skip


def _check_samples(file: Path, task: str, told: Any, items: Sequence[Item]) -> None:
    """Compare the number of samples with the result's.

    Raises:
        DataError: a sample stands twice, or there are more or fewer of them.
    """
    if (different := len({item.key for item in items})) != len(items):
        raise DataError(f"{task}: {len(items)} samples of {different} items: some stand twice", "evaluate the run again", file=file)
    if items and isinstance(told, int) and told != len(items):
        raise DataError(f"{task}: its n is {told}, and there are {len(items)} samples", "evaluate the run again", file=file)


def _sample_item(sample: Mapping[str, Any], metric: str, task: str) -> Item | None:
    value = sample.get(metric)
    if not isinstance(value, int | float | bool):
        return None
    outcome = {1.0: "right", 0.0: "wrong"}.get(float(value), "scored")
    doc = sample.get("doc") or {}
    category = str(doc.get("subject") or doc.get("category") or task)
    return Item(f"{sample['doc_id']}:{sample.get('doc_hash', '')[:12]}", 1, category, float(value), outcome)


def _imported(name: str, file: Path, result: Mapping[str, Any]) -> Iterator[Measure]:
    """Measures of an imported evaluation: items.jsonl, described in `measurements`."""
    rows = list(read_lines(file.with_name("items.jsonl")))
    for told in result["measures"]:
        metric, task = told["metric"], told.get("task") or ""
        mine = (row for row in rows if row["metric"] == metric and (row.get("task") or "") == task)
        items = tuple(_imported_item(row) for row in mine)
        yield Measure(
            name, str(result["suite"]), metric, told["label"], items, file, told.get("opponent"), task,
            told.get("higher_is_better", True), told.get("unit", "share"), told.get("reported"), told.get("reported_n"),
        )  # fmt: skip


def _imported_item(row: Mapping[str, Any]) -> Item:
    value = None if row.get("value") is None else float(row["value"])
    said, lengths = tuple(row.get("verdicts") or ()), tuple(row.get("lengths") or ())
    place = (str(row["question_id"]), int(row.get("turn") or 1), row.get("category") or "all")
    opposed = "" if row.get("shortened") else _same_text(row.get("opponent_answer"))
    return Item(*place, value, row["outcome"], said, bool(row.get("by_rule")), lengths, "", opposed)
