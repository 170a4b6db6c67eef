"""Numbers as text, in one form for report, terminal and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # stats imports scipy, and quick verbs print counts
    from recipes_lib.stats import Limits

MINUS = "\N{MINUS SIGN}"
NONE = "n/a"


def question_text(question: str) -> str:
    """Return a study's question as a heading. It may state something, or take its answer for
    granted ("Why is rank 32 better?"): so it stands there as the words of the study.
    """
    return f"The study asks, in its own words: {' '.join(question.split())}"


def plain_number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """Return a plain number."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return text
    if value < 0:
        return MINUS + text
    return f"+{text}" if signed else text


def metric_text(value: float | None, unit: str) -> str:
    """Return a metric's value: a share in percent.

    Example:
        >>> metric_text(0.625, "share"), metric_text(4.0, "grade")
        ('62.5%', '4.00')
    """
    return _with_unit(value, unit, "%", signed=False)


def difference_text(value: float | None, unit: str, signed: bool = True) -> str:
    """Return a difference: of shares in percentage points.

    Example:
        >>> difference_text(-0.125, "share"), difference_text(0.25, "grade", signed=False)
        ('−12.5 points', '0.25')
    """
    return _with_unit(value, unit, " points", signed)


def _with_unit(value: float | None, unit: str, hundredths: str, signed: bool) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    if unit == "share":
        return plain_number(100 * value, 1, signed) + hundredths
    return plain_number(value, _digits(value, unit), signed)


def interval_text(interval: Limits | None, unit: str, signed: bool = True) -> str:
    """Return the limits of an interval in the metric's unit, without the unit's name.

    Example:
        >>> interval_text((-0.01, 0.2), "share"), interval_text(None, "share")
        ('[−1.0, +20.0]', 'n/a')
    """
    if interval is None:
        return NONE
    scale = 100 if unit == "share" else 1
    digits = 1 if unit == "share" else _digits(max(map(abs, interval)), unit)
    low, high = (plain_number(scale * end, digits, signed) for end in interval)
    return f"[{low}, {high}]"


def p_text(p: float | None) -> str:
    """Return p with its sign of equality."""
    if p is None:
        return "no p"
    if p < 0.001:
        return "p < 0.001"
    return "p = 1" if p >= 0.9995 else f"p = {p:.3f}"


def sentence_list(names: Sequence[str], most: int = 0) -> str:
    """Return names as a list in a sentence, of many the first `most`.

    Example:
        >>> sentence_list(["a"]), sentence_list(["a", "b", "c"]), sentence_list(list("abcd"), 2)
        ('a', 'a, b and c', 'a, b and 2 more')
    """
    items = list(names)
    if most and len(items) > most:
        items = items[:most] + [f"{len(items) - most} more"]
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def setting_text(value: Any) -> str:
    """Return a value of a recipe as text of at most 60 characters."""
    text = "absent" if value is None else str(value)
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digits(value: float, unit: str) -> int:
    """Digits after the point: two for grades, three significant ones for plain numbers."""
    if unit == "grade" or value == 0:
        return 2
    return max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
