"""Numbers as text, one form each: shares in percent, their differences in points, p, counts.
Report, tables and claims all use these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
NONE = "n/a"
_STATEMENT = re.compile(
    r"[.!](\s|\Z)|\bp\s*[<>=\u2264\u2265]|[\[(]\s*[+\u2212-]?\d[^\])]*,|\bCI\b"
)  # a sentence, a p, an interval


def question_text(question: str) -> str:
    """Return a study's question as a heading; one that states something is marked as the study's
    own words, which nothing tested.

    Example:
        >>> question_text("Does rank matter?")
        'Does rank matter?'
        >>> question_text("rank 32 beats rank 8 (p < 0.001)")
        'Question, in the words of the study and not tested: rank 32 beats rank 8 (p < 0.001)'
    """
    text = " ".join(question.split())
    asks = text.endswith("?") and not _STATEMENT.search(text)
    return text if asks else f"Question, in the words of the study and not tested: {text}"


def plain_number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """Return a plain number.

    Example:
        >>> plain_number(-0.25, 2), plain_number(0.25, 2, signed=True), plain_number(None)
        ('−0.25', '+0.25', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):,.{digits}f}"
    zero = float(text.replace(",", "")) == 0
    sign = "" if zero else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def metric_text(value: float | None, unit: str) -> str:
    """Return a metric's value: a share in percent, a spread of shares in points.

    Example:
        >>> metric_text(0.625, "share"), metric_text(4.0, "grade"), metric_text(0.021, "points")
        ('62.5%', '4.00', '2.1 points')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if unit in ("points", "share"):
        return plain_number(100 * value, 1) + (" points" if unit == "points" else "%")
    return plain_number(value, _digits(value, unit))


def difference_text(value: float | None, unit: str) -> str:
    """Return a difference with its sign: of shares in percentage points.

    Example:
        >>> difference_text(-0.125, "share"), difference_text(0.25, "grade")
        ('−12.5 points', '+0.25')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if unit == "share":
        return f"{plain_number(100 * value, 1, signed=True)} points"
    return plain_number(value, _digits(value, unit), signed=True)


def interval_text(low: float | None, high: float | None, unit: str, signed: bool = True) -> str:
    """Return the limits of an interval in the metric's unit, without the unit's name.

    Example:
        >>> interval_text(-0.01, 0.2, "share"), interval_text(None, None, "share")
        ('[−1.0, +20.0]', 'n/a')
    """
    if low is None or high is None:
        return NONE
    digits = _digits(max(abs(low), abs(high)), unit)
    if unit == "share":
        low, high, digits = 100 * low, 100 * high, 1
    return f"[{plain_number(low, digits, signed)}, {plain_number(high, digits, signed)}]"


def p_text(p: float | None) -> str:
    """Return p with its sign of equality.

    Example:
        >>> p_text(0.0321), p_text(0.00001), p_text(None), p_text(1.0)
        ('p = 0.032', 'p < 0.001', 'no p', 'p = 1')
    """
    if p is None:
        return "no p"
    if p < 0.001:
        return "p < 0.001"
    return "p = 1" if p >= 0.9995 else f"p = {p:.3f}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun.

    Example:
        >>> count(1, "item"), count(1200, "item"), count(2, "entry", "entries")
        ('1 item', '1,200 items', '2 entries')
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def sentence_list(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    Example:
        >>> sentence_list(["a"]), sentence_list(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    *before, last = names or [""]
    return f"{', '.join(before)} and {last}" if before else last


def _digits(value: float, unit: str) -> int:
    """Digits after the point: two for grades, three significant ones for plain numbers."""
    if unit == "grade" or value == 0:
        return 2
    return max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
