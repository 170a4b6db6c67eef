"""The sample browser's material: questions, both answers, both raw verdicts. All of it is text of models, and stays text.

A report holds at most `MAX_SAMPLES` samples, and cuts a text above `MAX_CHARACTERS`; what is left out is counted, and all of it is
in the runs' own files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.compare.eval_files import against_file, judged_rows, read_lines
from recipes_lib.compare.measurements import EvalResult, Measurements, RunMeasurements
from recipes_lib.judging.outcomes import item_outcome

MAX_SAMPLES = 6_000
MAX_CHARACTERS = 8_000
MAX_TOTAL_CHARACTERS = 12_000_000


@dataclass(frozen=True)
class Sample:
    """One judged question: texts as numbers into `SampleSet.texts`. `verdicts` are (order, what was said, raw text)."""

    group: int
    question: str
    category: str
    outcome: str
    flip: bool
    instruction: int
    answer: int
    opponent: int | None
    verdicts: tuple[tuple[str, str, int | None], ...]


@dataclass
class SampleSet:
    """Samples of all comparisons with a table of their texts, and what did not fit."""

    groups: list[dict[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    total: int = 0
    cut_texts: int = 0
    _places: dict[str, int] = field(default_factory=dict, repr=False)
    _characters: int = 0

    def is_full(self) -> bool:
        """Whether no further sample fits."""
        return len(self.samples) >= MAX_SAMPLES or self._characters >= MAX_TOTAL_CHARACTERS

    def text(self, value: str) -> int:
        """Return the place of a text in the table, adding it; a long one is cut and says so."""
        if len(value) > MAX_CHARACTERS:
            self.cut_texts += value not in self._places
            kept = f"{value[:MAX_CHARACTERS]}\n[cut here: {len(value):,} characters in all]"
        else:
            kept = value
        if kept not in self._places:
            self._places[kept] = len(self.texts)
            self.texts.append(kept)
            self._characters += len(kept)
        return self._places[kept]


def collect_samples(measurements: Measurements) -> SampleSet:
    """Return the samples of every judged evaluation, comparisons between arms first."""
    found = SampleSet()
    pages = [
        (name, run, result)
        for name, arm in measurements.arms.items()
        for run in arm.runs
        for result in run.evals
        if result.suite in ("alpaca_eval", "mt_bench")
    ]
    between = [page for page in pages if measurements.opponent_name(page[2].against) in measurements.arms]
    judged = sum(len(measure.items) for _, _, result in pages for measure in result.measures[:1])
    step = max(1, -(-judged // MAX_SAMPLES))
    for name, run, result in [*between, *(page for page in pages if page not in between)]:
        _add(found, measurements, name, run, result, step)
    return found


def _add(found: SampleSet, measurements: Measurements, arm: str, run: RunMeasurements, result: EvalResult, step: int) -> None:
    """Add every `step`-th of one evaluation's samples."""
    rows = list(_rows(run, result))
    found.total += len(rows)
    if not rows or found.is_full():
        return
    opponent = measurements.opponent_name(result.against)
    seed = f", seed {run.seed}" if len(measurements.arms[arm].runs) > 1 else ""
    group = len(found.groups)
    title = f"{result.eval}: {arm}{seed}" + (f" against {opponent}" if opponent else ", graded")
    folder = "/".join(result.file.parent.parts[-3:])
    found.groups.append({"title": title, "arm": arm, "opponent": opponent or "", "folder": folder})
    for row in rows[::step]:
        if found.is_full():
            return
        verdicts = tuple((order, said, None if raw is None else found.text(raw)) for order, said, raw in row["verdicts"])
        opponent_text = None if row["opponent"] is None else found.text(row["opponent"])
        place = found.text(row["instruction"])
        found.samples.append(
            Sample(
                group, row["question"], row["category"], row["outcome"], row["flip"], place, found.text(row["answer"]), opponent_text,
                verdicts,
            )
        )  # fmt: skip


def _rows(run: RunMeasurements, result: EvalResult) -> Iterator[dict[str, Any]]:
    """One evaluation's questions with answers and verdicts."""
    if result.result.get("measures") is not None:
        return _imported(result)
    return _alpaca_eval(result) if result.suite == "alpaca_eval" else _mt_bench(run, result)


def _alpaca_eval(result: EvalResult) -> Iterator[dict[str, Any]]:
    for row in read_lines(against_file(result.file.parent / "samples", "samples", result.against)):
        by_order = {verdict["order"]: verdict for verdict in row["verdicts"]}
        yield _pair(row["question_id"], row["category"], row["instruction"], row["answer"], row["opponent_answer"], by_order)


def _pair(question: str, category: str, instruction: str, answer: str, opponent: str | None, rows: Mapping[str, Any]) -> dict[str, Any]:
    """One question of a comparison, from its stored verdicts by order."""
    outcome = item_outcome(question, rows)
    said = {"AB": outcome.first, "BA": outcome.second}
    verdicts = [(order, said[order], _raw(rows.get(order))) for order in ("AB", "BA")]
    flip = outcome.resolved and not outcome.by_rule and outcome.first == outcome.second and outcome.first != "tie"
    facts = {"question": question, "category": category, "outcome": outcome.outcome, "flip": flip}
    return {**facts, "instruction": instruction, "answer": answer, "opponent": opponent, "verdicts": verdicts}


def _raw(row: Mapping[str, Any] | None) -> str | None:
    """What the judge wrote; for a judge that gives probabilities those, for a verdict by rule its reason."""
    if row is None:
        return None
    if row.get("raw") is not None:
        return str(row["raw"])
    if row.get("source") == "rule":
        return f"decided without the judge: {row.get('reason') or 'by rule'}"
    if row.get("probabilities"):
        return ", ".join(f"{token} {value:.4f}" for token, value in row["probabilities"].items())
    return f"probability mass on the verdicts {row['mass']:.4f}" if row.get("mass") is not None else None


def _mt_bench(run: RunMeasurements, result: EvalResult) -> Iterator[dict[str, Any]]:
    """Turns graded, or compared where the result has an opponent."""
    folder = result.file.parent
    answers, questions = _turns(folder, "model_answer.jsonl"), _turns(folder, "question.jsonl")
    pairs = bool(result.result.get("pairs"))
    file = against_file(folder, "judgments", result.against) if pairs else folder / "judgments.jsonl"
    theirs = _turns(run.folder.parent / str(result.against) / "evals" / result.eval, "model_answer.jsonl") if pairs else {}
    by_item: dict[str, dict[str, Any]] = {}
    for row in judged_rows(file, result.result, "relative" if pairs else "absolute"):
        by_item.setdefault(row["question_id"], {})[row["order"]] = row
    for key, rows in by_item.items():
        question, _, turn = key.rpartition(":")
        place = (question, int(turn))
        category = next(iter(rows.values()))["meta"]["category"]
        asked, answer = questions.get(place, f"question {question}, turn {turn}"), answers.get(place, "")
        if pairs:
            yield _pair(f"{question}, turn {turn}", category, asked, answer, theirs.get(place, ""), rows)
            continue
        row = rows["single"]
        ok = row["status"] == "ok"
        said = str(row["value"]) if ok else row["status"]
        facts = {"question": f"{question}, turn {turn}", "category": category, "outcome": f"grade {said}" if ok else "unresolved"}
        yield {**facts, "flip": False, "instruction": asked, "answer": answer, "opponent": None, "verdicts": [("grade", said, _raw(row))]}


def _turns(folder: Any, name: str) -> dict[tuple[str, int], str]:
    """Texts by question and turn, of FastChat's question or answer file."""
    return {
        (str(row["question_id"]), turn): text
        for row in read_lines(folder / "samples" / name)
        for turn, text in enumerate(row["turns"] if "turns" in row else row["choices"][0]["turns"], 1)
    }


def _imported(result: EvalResult) -> Iterator[dict[str, Any]]:
    """Items of an imported evaluation that carry their texts."""
    for row in read_lines(result.file.with_name("items.jsonl")):
        if not row.get("answer") and not row.get("raws"):
            continue
        raws = list(row.get("raws") or [])
        said = [str(verdict) for verdict in row.get("verdicts") or []]
        orders = ("AB", "BA") if row.get("opponent_answer") is not None else ("grade",)
        verdicts = [(order, said[n] if n < len(said) else "", raws[n]) for n, order in enumerate(orders) if n < len(raws)]
        value = row.get("value")
        outcome = f"grade {value:g}" if row["outcome"] == "graded" and value is not None else row["outcome"]
        flip = len(said) > 1 and said[0] == said[1] and said[0] in ("A", "B")
        turn = f", turn {row['turn']}" if row.get("turn") else ""
        yield {
            "question": f"{row['question_id']}{turn}", "category": row.get("category") or "all", "outcome": outcome, "flip": flip,
            "instruction": row.get("instruction") or "", "answer": row.get("answer") or "", "opponent": row.get("opponent_answer"),
            "verdicts": verdicts,
        }  # fmt: skip
