"""The data of a report's browser: every question with the answers of all arms, side by side.

Texts are data here, and the page shows them through `textContent` alone, so they stay text.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recipes_lib.analysis.runs import Arms
from recipes_lib.core.terminal import printable
from recipes_lib.evals.log import ORDERS, EvalLog, Metric, Sample

MOST_CHARACTERS = 330_000  # of all texts of a page
LONGEST_TEXT = 4_000


@dataclass(frozen=True)
class _Answer:
    group: int
    sample: Sample
    score: float | None  # more is better; None without a verdict


def question_data(arms: Arms) -> dict[str, Any]:
    """Return the questions of every evaluation that has texts, comparisons between arms first.

    A page holds what fits into `MOST_CHARACTERS`: of more questions, evenly chosen ones. A question
    is [evaluation, name, category, place of its text, answers], an answer [group, outcome, score,
    whether its verdict turned, place of its text, of the opponent's, verdicts], a verdict [order,
    what was said, place of its text]. A group is what one training answered in one evaluation.
    """
    groups: list[dict[str, Any]] = []
    questions: dict[str, dict[tuple[str, int], list[_Answer]]] = {}  # by evaluation
    size = 0  # of all texts, about
    logs = sorted(arms.logs, key=lambda pair: arms.opponent(pair[1].against) not in arms.by_name)
    for arm, log in logs:
        for metric in _first_metrics(log):
            samples = [sample for sample in metric.samples if _has_text(sample)]
            if not samples:
                continue
            title = log.eval
            if metric.task:
                title += f"/{metric.task}"
            of_evaluation = questions.setdefault(title, defaultdict(list))
            group = {
                "eval": list(questions).index(title),
                "arm": arm,
                "run": log.target if len(arms.by_name[arm].runs) > 1 else "",
                "opponent": arms.opponent(log.against) or "",
                "folder": "/".join(log.file.parent.parts[-3:]),
            }
            for sample in samples:
                texts = [sample.answer, sample.opponent, *sample.raws]
                if sample.key not in of_evaluation:  # its question stands there once
                    texts.append(sample.input)
                answer = _Answer(len(groups), sample, _score(metric, sample))
                of_evaluation[sample.key].append(answer)
                size += 80 + sum(min(len(text or ""), LONGEST_TEXT) for text in texts)
            groups.append(group)
    step = max(1, math.ceil(size / MOST_CHARACTERS))
    places: dict[str, int] = {}  # of each text, which stands there once
    rows = []
    for number, of_evaluation in enumerate(questions.values()):
        for answers in list(of_evaluation.values())[::step]:
            rows.append(_question(number, answers, places))
    return {
        "total": sum(map(len, questions.values())),
        "evals": list(questions),
        "groups": groups,
        "questions": rows,
        "texts": list(places),
    }


def _first_metrics(log: EvalLog) -> Iterator[Metric]:
    """Of each task the comparison, else the first metric."""
    first: dict[str, Metric] = {}
    for metric in sorted(log.metrics, key=lambda metric: metric.opponent is None):
        first.setdefault(metric.task, metric)
    yield from first.values()


def _has_text(sample: Sample) -> bool:
    return bool(sample.answer or sample.input) or any(sample.raws)


def _score(metric: Metric, sample: Sample) -> float | None:
    if sample.value is None or metric.higher_is_better is None:
        return None
    return sample.value if metric.higher_is_better else -sample.value


def _question(number: int, answers: list[_Answer], places: dict[str, int]) -> list[object]:
    sample = answers[0].sample
    name = sample.id
    if sample.turn > 1:
        name += f", turn {sample.turn}"
    place = _place(sample.input or f"question {sample.id}", places)
    rows = [_answer(answer, places) for answer in answers]
    return [number, printable(name), printable(sample.category), place, rows]


def _answer(answer: _Answer, places: dict[str, int]) -> list[object]:
    sample = answer.sample
    outcome = sample.outcome
    if outcome == "graded" and sample.value is not None:
        outcome = f"grade {sample.value:g}"
    answer_place = _place(sample.answer, places)
    opponent_place = _place(sample.opponent, places)
    orders = ORDERS if sample.opponent is not None else ("grade",)
    verdicts = []
    for order, verdict, raw in zip(orders, sample.verdicts, sample.raws, strict=False):
        verdicts.append([order, printable(verdict), _place(raw, places)])
    score = answer.score
    turned = int(sample.flip)
    return [answer.group, outcome, score, turned, answer_place, opponent_place, verdicts]


def _place(text: str | None, places: dict[str, int]) -> int | None:
    """The number of a text on the page; None where there is none."""
    if text is None:
        return None
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}\n[cut here: {len(text):,} characters in all]"
    return places.setdefault(printable(text), len(places))
