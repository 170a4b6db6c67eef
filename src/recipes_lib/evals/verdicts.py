"""From a judge's text to a verdict, from verdicts in both orders to a sample, and from samples to a
metric with its interval.

A verdict stands at the very end of the text, in one of the forms that the parser of prometheus-eval
takes (`[RESULT] 4`, `4/5`, `score of 3 out of 5`, `[RESULT] Response A`, `Result: B`), or what chat
models make of them: Markdown around it, `[RESULT]: A`, `[[A]]`, a full stop. Different verdicts in
one text are a conflict. A text without a verdict is never a tie and never dropped: its sample is
unresolved, and widens the bounds, once as lost, once as won.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from recipes_lib.core.files import Row
from recipes_lib.evals.log import SCORE, UNRESOLVED, Check, Metric, Sample

UNIT_SCALES = {"share": (0.0, 1.0), "grade": (1.0, 5.0)}
GRADES = ("1", "2", "3", "4", "5")
CHOICES = ("A", "B")

_FLAGS = re.IGNORECASE | re.ASCII
_EMPHASIS = re.compile(r"\*+|`+|__+")
# each pattern finds a verdict at the end of a text, the one below it every bracketed verdict
_GRADE = re.compile(
    r"(?:[\[(]?(?:(?:overall|final)\s+)*(?:\[(?:result|score)\]|(?<![a-z0-9])(?:score|result))"
    r"(?:\s+of)?:?\s*[(\[\s]*(\d+)(?:[)\]]|\s*/\s*5|\s+out\s+of\s+5)?\]?|\[\[(\d+)\]\])\.?\s*\Z",
    _FLAGS,
)
_ANY_GRADE = re.compile(r"\[(?:result|score)\]:?[(\[\s]*(\d+(?:\.\d+)?)|\[\[(\d+)\]\]", _FLAGS)
_CHOICE = re.compile(
    r"(?:(?:\[result\]:?(?:\s+response)?\s*|\[result:\s*|\[response\s+"
    r"|(?:\A|\n)[ \t]*result(?::\s*|\s+))([A-Z])\]?|\[\[([A-Z])\]\])\.?\s*\Z",
    _FLAGS,
)
_ANY_CHOICE = re.compile(
    r"(?:\[result\]:?(?:\s+response)?[(\s]*|\[result:\s*)([A-Z]|tie)"
    r"(?![a-z0-9'])(?!\s*(?:or|/)\s*[AB]\b)|\[\[([A-Z])\]\]",
    _FLAGS,
)


def verdict_row(status: str, reason: str | None = None, value: str | None = None) -> Row:
    """Return what is stored of a verdict: 1 to 5, "A" or "B", or why there is none."""
    number = int(value) if value in GRADES else value
    return {"status": status, "value": number, "reason": reason}


def parse_verdict(
    text: str | None,
    allowed: Sequence[str],
    finish_reason: str | None = None,
    as_json: bool = False,
) -> Row:
    """Return the verdict in a judge's text.

    Args:
        text: what the judge wrote after the prompt.
        allowed: CHOICES or GRADES.
        finish_reason: "length" if it was cut off; such a text has no verdict, however it ends.
        as_json: whether the text is `{"feedback": ..., "result": ...}`.

    Example:
        >>> parse_verdict("Clear and correct. **[RESULT] 4**", GRADES)["value"]
        4
        >>> parse_verdict("[RESULT] B was tempting. Final: [RESULT] A", CHOICES)["reason"]
        'conflict: A, B'
    """
    if finish_reason == "length":
        return verdict_row("truncated", "the judge's text ended at its token limit")
    plain = _EMPHASIS.sub("", text or "")
    if not (text or "").strip():
        return verdict_row("empty", "the judge wrote nothing")
    values = _in_json(plain) if as_json else _at_the_end(plain, CHOICES[0] in allowed)
    if len(values) > 1:
        return verdict_row("unparsed", f"conflict: {', '.join(sorted(values))}")
    value = next(iter(values), "")
    if value in allowed:
        return verdict_row("ok", value=value)
    return verdict_row("unparsed", "no verdict at the end of the text")


def _in_json(text: str) -> set[str]:
    try:
        return {str(json.loads(text.removeprefix("json"))["result"]).strip().upper()}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def _at_the_end(text: str, is_choice: bool) -> set[str]:
    """The verdict at the end of a text and all others in it; none without one at the end."""
    end, anywhere = (_CHOICE, _ANY_CHOICE) if is_choice else (_GRADE, _ANY_GRADE)
    if not (last := end.search(text)):
        return set()
    alone = filter(None, (end.match(line.strip()) for line in text.splitlines()))
    matches = [last, *anywhere.finditer(text), *alone]
    return {next(filter(None, match.groups())).upper() for match in matches}


# ---- samples ----


def sample_of(
    question_id: str, rows: Mapping[str, Mapping[str, Any]], orders: Sequence[str], **known: Any
) -> Sample:
    """Return a comparison or a grade as a sample, given the stored judgments by order. Where both
    orders name the same answer it wins, where they differ it is a tie; without both verdicts it is
    unresolved.
    """
    judged = [rows.get(order, {"status": "missing", "source": ""}) for order in orders]
    verdicts = tuple(
        str(row["value"] if row["status"] == "ok" else row["status"]) for row in judged
    )
    outcome, value = UNRESOLVED, None
    if len(orders) == 1 and verdicts[0].isdigit():
        outcome, value = "graded", float(verdicts[0])
    elif set(verdicts) <= {"A", "B", "tie"}:
        is_tie = "tie" in verdicts or len(set(verdicts)) == 1
        outcome = "tie" if is_tie else "win" if verdicts[0] == "A" else "loss"
        value = SCORE[outcome]
    return Sample(
        question_id,
        value=value,
        outcome=outcome,
        verdicts=verdicts,
        by_rule=any(row["source"] == "rule" for row in judged),
        raws=tuple(map(_raw, judged)),
        **known,
    )


def _raw(row: Mapping[str, Any]) -> str | None:
    """What the judge wrote; its probabilities where it gives those, the reason of a rule."""
    if row["source"] == "rule":
        return f"decided without the judge: {row['reason']}"
    if shares := row.get("probabilities"):
        return ", ".join(f"{token} {share:.4f}" for token, share in shares.items())
    return row.get("raw")


# ---- metrics ----


def numbers_of(
    values: Sequence[float | None], clusters: Sequence[str], unit: str = "share"
) -> dict[str, Any]:
    """Return the mean of the values that are known, its 95% interval over clusters, and n."""
    known = [pair for pair in zip(values, clusters, strict=True) if pair[0] is not None]
    if not known:
        return {"n": 0}
    import numpy as np  # which `recipes study --help` does without

    from recipes_lib.analysis.stats import estimate, mean_interval

    table, names = np.array([[value for value, _ in known]], float), [name for _, name in known]
    if unit in UNIT_SCALES:
        ends = mean_interval(table, names, UNIT_SCALES[unit])
    else:
        ends = estimate(table, names).interval()
    low, high = ends or (None, None)
    mean = math.fsum(value or 0.0 for value, _ in known) / len(known)
    return {"value": mean, "low": low, "high": high, "n": len(known)}


def metric_of(
    metric: str,
    label: str,
    samples: Sequence[Sample],
    unit: Literal["share", "grade", "number"] = "share",
    **known: Any,
) -> Metric:
    """Return a metric that is the mean of samples; those of one question are one observation."""
    clusters = [sample.same_as or sample.id for sample in samples]
    numbers = numbers_of([sample.value for sample in samples], clusters, unit)
    return Metric(metric, label, tuple(samples), unit=unit, **numbers, **known)


def bounds_of(samples: Sequence[Sample], unit: str = "share") -> tuple[float, float]:
    """Return the mean if everything unresolved had got the lowest value, and the highest."""
    values = [sample.value for sample in samples]
    lowest, highest = (
        math.fsum(end if value is None else value for value in values) / len(values)
        for end in UNIT_SCALES[unit]
    )
    return lowest, highest


# ---- numbers in tables ----


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def shown_rate(rate: Metric | Check, digits: int = 2, unit: str = "share") -> str:
    """Return a value with its interval, a share in percent."""
    scale, digits, sign = (100, 1, "%") if unit == "share" else (1, digits, "")
    if rate.value is None:
        return "n/a"
    shown = f"{scale * rate.value:.{digits}f}{sign}"
    if rate.low is None or rate.high is None:
        return shown
    return f"{shown} [{scale * rate.low:.{digits}f}, {scale * rate.high:.{digits}f}]"
