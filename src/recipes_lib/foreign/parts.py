"""What one foreign file gives to an evaluation, and what it could not give: judgments, answers, or
lm-eval's table and samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.config.lm_eval import PROTOCOL, metric_direction, parts_of
from recipes_lib.config.suggestions import did_you_mean
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.json_files import Row
from recipes_lib.eval_log import REFERENCE, SCORE, Measure, Sample, TaskScore
from recipes_lib.foreign.files import Foreign, is_number
from recipes_lib.foreign.judgments import (
    Judgments,
    Record,
    graded_fields,
    missing_turns,
    read_judgments,
)
from recipes_lib.foreign.replay import report_of
from recipes_lib.judging.outcomes import outcome_of
from recipes_lib.judging.store import judgment_key, text_hash

_CATEGORIES = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
# AlpacaEval's reference answers by any of the names they go under.
_DAVINCI = ("text_davinci_003", "text-davinci-003", "")
_CHANCE = 1e-6


@dataclass
class Part:
    """One file's share of one evaluation.

    `judgments` and `answers` are rows of our own stores, `tasks` and `samples` (lines by task) are
    lm-eval's. `lacks` says what could not be carried over. `rows_of` is the model whose rows these
    are, where the file holds several. `judge` is the judge's fingerprint, `missing` are turns
    without a judgment, and `report` is what `recipes judge replay` says about the judgments.
    """

    eval: str
    file: Foreign
    measures: list[Measure] = field(default_factory=list)
    judgments: list[Row] = field(default_factory=list)
    answers: list[Row] = field(default_factory=list)
    models: tuple[str, ...] = ()
    opponent: str | None = None
    rows_of: str | None = None
    flags: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    judge: str | None = None
    judge_name: str | None = None
    missing: list[Row] = field(default_factory=list)
    report: Row | None = None
    tasks: list[TaskScore] = field(default_factory=list)
    samples: dict[str, list[str]] = field(default_factory=dict)
    subset: str | None = None
    protocol: Row = field(default_factory=dict)

    @property
    def items(self) -> list[Sample]:
        """The samples of all measures."""
        return [one for measure in self.measures for one in measure.samples]


def _question_id(instruction: str) -> str:
    """The id of a question that comes without one: a hash of its text, the same in every file."""
    return text_hash(instruction.strip())[:12]


def _one_model(file: Foreign, names: Sequence[str], wanted: str | None) -> str:
    found = list(dict.fromkeys(names))
    listed = ", ".join(found[:8])
    if wanted is None:
        if len(found) > 1:
            listed += f" and {len(found) - 8} more" if len(found) > 8 else ""
            raise file.error(
                f"holds {len(found)} models: {listed}", f"name one: --model {found[0]}"
            )
        return found[0]
    # a file that names no model is about the one that is meant
    if wanted in found or found == [""]:
        return wanted if wanted in found else ""
    near = did_you_mean(wanted, found, "--model ")
    what = f"{file.path.name} holds no model '{wanted}'"
    raise RecipeError(what, *near, f"models there: {listed}")


def _unique(file: Foreign, keys: Sequence[tuple[str, int]], rows: Sequence[Any]) -> list[Any]:
    """The rows without exact repetitions; two different ones under one key are refused."""
    seen: dict[tuple[str, int], Any] = {}
    twice = [key for key, row in zip(keys, rows, strict=True) if seen.setdefault(key, row) != row]
    if twice:
        ids = ", ".join(f"{question} turn {turn}" for question, turn in dict.fromkeys(twice[:20]))
        what = f"{len(twice)} rows stand under a question and turn that is there already: {ids}"
        raise file.error(what, "keep one of each")
    return list(seen.values())


# ---- judgments ----


def judged_part(file: Foreign, model: str | None, against: str | None) -> Part:
    """Return the judgments of one model, against one opponent where it is a comparison.

    Raises:
        DataError: several models or opponents and none was named, or a question was judged twice
            with different results.
        RecipeError: the model or opponent that was named is not there.
    """
    judgments, form = read_judgments(file), str(file.format)
    name, opponent, records = _chosen(judgments, model, against)
    records = _unique(file, [record.place for record in records], records)
    named: Any = "prometheus-7b-v2.0"  # the original study had one judge
    if not form.startswith("original"):
        first = file.rows[0][1]
        named = first.get("judge") or first.get("annotator")
        named = str(named[0]) if isinstance(named, list) and named else named
    judge_name = named if isinstance(named, str) else None
    judge = f"imported:{text_hash(judge_name or form)[:16]}"
    samples = [
        dataclasses.replace(
            record,
            id=_id(record),
            category=_category(record.id) if judgments.suite == "mt_bench" else "all",
            input=record.input or record.id,
        )
        for record in records
    ]
    missing = missing_turns(samples)
    absent = (f"question {question} turn {turn}: no judgment" for question, turn in missing[:20])
    answers = []
    if form == "original-alpaca-eval-csv":
        answers = [_answer(one.id, 1, one.answer or "", name, one.input or "") for one in samples]
    sides = {side for one in judgments.records for side in (one.model, one.against)} - {""}
    report = report_of(dataclasses.replace(judgments, records=records))
    return Part(
        judgments.suite,
        file,
        list(_measures(judgments, opponent, samples)),
        [row for one in samples for row in _judgment_rows(one, judgments, judge)],
        answers,
        models=(name,) if name else (),
        opponent=opponent,
        rows_of=name if len(sides) > 1 else None,
        flags=judgments.format.flags,
        lacks=(*judgments.format.lacks, *absent),
        judge=judge,
        judge_name=judge_name,
        missing=[{"question_id": question, "turn": turn} for question, turn in missing],
        report={**report, "file": file.path.name},
    )


def _category(question: str) -> str:
    """The category of one of MT-Bench's 80 questions, ten ids each; "all" for any other."""
    place = (int(question) - 81) // 10 if question.isdigit() else -1
    return _CATEGORIES[place] if 0 <= place < len(_CATEGORIES) else "all"


def _chosen(
    judgments: Judgments, model: str | None, against: str | None
) -> tuple[str, str | None, list[Record]]:
    """The model that is meant, its opponent, and its records, the model's side first."""
    file, records = judgments.file, judgments.records
    sides = dict.fromkeys((record.model, record.against) for record in records)
    if file.format == "fastchat-pair" and not (model is None and len(sides) == 1):
        name = _one_model(file, [side for pair in sides for side in sorted(pair)], model)
        records = [_seen_from(one, name) for one in records if name in (one.model, one.against)]
    else:
        name = _one_model(file, [record.model for record in records], model)
        records = [record for record in records if record.model == name]
    if not judgments.pairs:
        return name, None, records
    opponents = list(dict.fromkeys(record.against for record in records))
    names = ", ".join(opponents[:8])
    if against is not None and against not in (*opponents, REFERENCE):
        raise file.error(f"holds no comparison with '{against}'", f"opponents there: {names}")
    if len(opponents) > 1 and against is None:
        what = f"compares with {len(opponents)} opponents: {names}"
        raise file.error(what, f"name one: --against {opponents[0]}")
    chosen = str(against) if against in opponents else opponents[0]
    is_reference = judgments.suite == "alpaca_eval" and chosen in _DAVINCI
    records = [record for record in records if record.against == chosen]
    return name, REFERENCE if is_reference else chosen, records


def _seen_from(record: Record, name: str) -> Record:
    """A comparison of FastChat's with `name` as the first of the two."""
    if record.model == name:
        return record
    # Game 1 shows model_1 first: seen from model_2 it is the game in which it stood second.
    verdicts = record.verdicts[::-1]
    outcome = outcome_of(verdicts)
    return dataclasses.replace(
        record,
        model=record.against,
        against=record.model,
        recorded=None if record.recorded is None else outcome,
        value=SCORE.get(outcome),
        outcome=outcome,
        verdicts=verdicts,
        raws=record.raws[::-1],
    )


def _id(record: Record) -> str:
    """The question's id: FastChat's number, or a hash of the instruction."""
    plain = len(record.id) <= 40 and record.id.replace("-", "").isalnum()
    return record.id if plain else _question_id(record.id)


def _measures(
    judgments: Judgments, opponent: str | None, samples: Sequence[Record]
) -> Iterator[Measure]:
    """A win rate, and for the original study its comparison score; or grades, FastChat's of 1-10 as
    another metric than ours of 1-5, which we write in its format too.
    """
    suite, path = judgments.suite, judgments.file.path

    def measure(metric: str, label: str, unit: str, mine: Sequence[Sample] = samples) -> Measure:
        return Measure(suite, suite, metric, label, tuple(mine), path, opponent, unit=unit)

    if not judgments.pairs and judgments.highest == 10:
        yield measure("grade_1_10", "MT-Bench mean grade, 1-10", "number")
    elif not judgments.pairs:
        yield measure("grade", "MT-Bench mean grade, 1-5", "grade")
    else:
        title = "AlpacaEval" if suite == "alpaca_eval" else "MT-Bench"
        yield measure("win_rate", f"{title} win rate", "share")
    if judgments.file.format == "original-alpaca-eval-csv":
        label = "AlpacaEval comparison score, 1-5 (5: the model's answer is much better)"
        graded = [
            dataclasses.replace(one, **graded_fields(one.score if one.resolved else None))
            for one in samples
        ]
        yield measure("comparison_score", label, "grade", graded)


def _judgment_rows(record: Record, judgments: Judgments, judge: str) -> Iterator[Row]:
    """Rows of judgments.jsonl, one per verdict; an order that was not judged has none."""
    pair = judgments.pairs
    orders = ("AB", "BA") if pair else ("single",)
    if judgments.file.format == "alpaca-eval-annotations":
        orders = ("unknown",)
    name = record.id if judgments.suite == "alpaca_eval" else f"{record.id}:{record.turn}"
    for order, verdict, raw in zip(orders, record.verdicts, record.raws or [None], strict=False):
        shown = [record.answer, record.opponent] if pair else [record.answer]
        known = [text for text in shown if text is not None and not record.shortened]
        known = [] if len(known) < len(shown) else known[::-1] if order == "BA" else known
        hashes = list(map(text_hash, known))
        ok = verdict != "unparsed"
        unread = "empty" if raw is not None and not raw.strip() else "unparsed"
        value: Any = verdict if pair and ok else record.score if ok else None
        yield {
            "key": judgment_key(name, order, judge, text_hash(raw or ""), hashes),
            "kind": "relative" if pair else "absolute",
            "question_id": name,
            "order": order,
            "status": "ok" if ok else unread,
            "value": int(value) if isinstance(value, float) and value.is_integer() else value,
            "reason": None,
            "source": "imported",
            "judge": judge,
            "prompt_hash": None,
            "answer_hashes": hashes,
            "lengths": list(map(len, known)),
            "marker_in_answer": None,
            "cut": None,
            "seed": None,
            "temperature": None,
            "attempts": [],
            "meta": {"category": record.category, "turn": record.turn, "question": record.id},
            "raw": raw,
            "finish_reason": None,
        }


# ---- answers ----


def answers_part(file: Foreign, model: str | None) -> Part:
    """Return the answers of one model, from alpaca_eval's or FastChat's file.

    Raises:
        DataError: an answer is no text, a question stands there twice, or several models answer and
            none was named.
    """
    fastchat = file.format == "fastchat-answers"
    name_of = "model_id" if fastchat else "generator"
    chosen = _one_model(file, [str(row.get(name_of, "")) for _, row in file.rows], model)
    answers: list[Row] = []
    mine = [line for line in file.rows if str(line[1].get(name_of, "")) == chosen]
    for number, (line, row) in enumerate(mine, 1):
        if fastchat:
            try:
                turns = row["choices"][0]["turns"]
            except (LookupError, TypeError):
                turns = None
            if not isinstance(turns, list) or not all(isinstance(text, str) for text in turns):
                raise file.error("an answer needs choices[0].turns, a list of texts", line=line)
            question = str(row["question_id"])
            answers += (_answer(question, n, text, chosen) for n, text in enumerate(turns, 1))
        else:
            asked, output = row["instruction"], row["output"]
            if not isinstance(asked, str) or not isinstance(output, str):
                raise file.error(f"row {number}: instruction and output must be texts", line=line)
            asked += f"\n\n{row['input']}" if row.get("input") else ""
            answers.append(_answer(_question_id(asked), 1, output, chosen, asked))
    return Part(
        "mt_bench" if fastchat else "alpaca_eval",
        file,
        answers=_unique(file, [(row["question_id"], row["turn"]) for row in answers], answers),
        models=(chosen,) if chosen else (),
        rows_of=chosen if len(mine) < len(file.rows) else None,
        lacks=(
            "decoding settings, seed and prompt format of the answers are not in the file",
            "whether an answer was cut at a token limit is not in the file",
        ),
    )


def _answer(question: str, turn: int, text: str, model: str, instruction: str = "") -> Row:
    """A row of generations.jsonl; what a foreign file does not tell is null."""
    return {
        "key": text_hash(f"imported:{question}:{turn}:{model}:{text}"),
        "question_id": question,
        "turn": turn,
        "answer": text,
        "finish_reason": None,
        "tokens": None,
        "seed": None,
        "decoding": None,
        "model": f"imported:{model}",
        "prompt_format_hash": None,
        **({"instruction": instruction} if instruction else {}),
    }


# ---- lm-eval ----


def harness_part(file: Foreign, samples: Sequence[Foreign]) -> Part:
    """Return the evaluation of one lm-eval results file with the samples beside it.

    Raises:
        DataError: a number in the file is none, or samples do not add up to the results.
    """
    found = file.rows[0][1]
    tasks = [
        row
        for task, metrics in found["results"].items()
        for row in _task_rows(file, found, task, metrics)
    ]
    if not tasks:
        raise file.error("holds no result", "a task needs keys like 'acc,none'")
    for sample in samples:
        _check_samples(sample, [row for row in tasks if row.task == sample.task])
    config: Row = found.get("config") or {}
    limit = config.get("limit")
    lacks = []
    if any(row.n is None for row in tasks):
        lacks.append(
            "the number of items behind the results is not in the file, so they have no interval of"
            " ours"
        )
    if bare := {row.task for row in tasks} - {sample.task for sample in samples}:
        lacks.append(
            f"{len(bare)} tasks and groups have no samples: their numbers can be shown, and tested"
            " against nothing"
        )
    models = [str(found[key]) for key in ("model_name", "model_source") if found.get(key)]
    return Part(
        "lm_eval",
        file,
        models=tuple(models[:1]),
        lacks=tuple(lacks),
        tasks=tasks,
        subset=f"subset, limit={limit:g} per task" if isinstance(limit, int | float) else None,
        protocol={name: config.get(name) for name in (*PROTOCOL, "model_args", "model")},
        samples={
            sample.task: [json.dumps(row, ensure_ascii=False) for _, row in sample.rows]
            for sample in samples
        },
    )


def _task_rows(file: Foreign, found: Row, task: str, metrics: Row) -> Iterator[TaskScore]:
    """One row per metric and filter of a task or a group."""
    config = (found.get("configs") or {}).get(task) or {}
    for name, value in metrics.items():
        metric, _, chosen = name.partition(",")
        if not chosen or metric.endswith("_stderr") or isinstance(value, str):
            continue
        if not is_number(value):
            raise file.error(f"{task}: {name} is {value!r}, which is no finite number")
        error = metrics.get(f"{metric}_stderr,{chosen}")
        error = error if is_number(error) else None
        yield TaskScore(
            task=task,
            metric=metric,
            filter=chosen,
            value=value,
            stderr=error,
            low=None if error is None else value - 1.96 * error,
            high=None if error is None else value + 1.96 * error,
            interval=None if error is None else "1.96 standard errors of lm_eval",
            n=((found.get("n-samples") or {}).get(task) or {}).get("effective"),
            num_fewshot=(found.get("n-shot") or {}).get(task, config.get("num_fewshot")),
            version=(found.get("versions") or {}).get(task),
            higher_is_better=metric_direction(found, task, metric),
            parts=parts_of(found, task),
        )


def _check_samples(sample: Foreign, rows: Sequence[TaskScore]) -> None:
    """Compare samples with the results they are said to be behind."""
    if not rows:
        what = f"samples of task '{sample.task}', which the results do not have"
        raise sample.error(what, "name the results file of the same evaluation")
    for row in rows:
        scores = [
            float(line[row.metric])
            for _, line in sample.rows
            if line.get("filter", "none") == row.filter
            and isinstance(line.get(row.metric), int | float | bool)
        ]
        mean = sum(scores) / len(scores) if scores else 0.0
        what = ""
        value = row.value or 0.0
        if row.n is not None and scores and len(scores) != row.n:
            what = f"{len(scores)} samples, and the results say {row.n}"
        elif scores and set(scores) <= {0.0, 1.0} and abs(mean - value) > _CHANCE:
            what = f"its mean {row.metric} is {mean:.4f}, and the results say {value:.4f}"
        if what:
            raise sample.error(what, "are they of the same evaluation?")
