"""From verdicts in both orders to samples, and from samples to a metric with its interval.

The rule, for a comparison of a candidate with an opponent: the candidate is Response A in order
"AB" and Response B in order "BA". When both verdicts are ok, the sample is a win or a loss if they
name the same answer, and a tie if they do not. A sample with a verdict that is missing or not ok is
unresolved; it is counted in n and enters the bounds, once as lost and once as won.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recipes_lib.analysis.stats import estimate, mean_interval
from recipes_lib.evals.log import ORDERS, SCORE, UNRESOLVED, Metric, Sample

UNIT_SCALES = {"share": (0.0, 1.0), "grade": (1.0, 5.0)}


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; None where there are too few values for one."""

    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0


def outcome_of(verdicts: Sequence[str]) -> str:
    """Return the outcome of the verdicts in order AB and BA: win, loss, tie, or unresolved where
    one of them is a status.

    Example:
        >>> outcome_of(("A", "B")), outcome_of(("A", "A")), outcome_of(("A", "empty"))
        ('win', 'tie', 'unresolved')
    """
    if not set(verdicts) <= {"A", "B", "tie"}:
        return UNRESOLVED
    first, second = verdicts
    return "tie" if first == second or "tie" in verdicts else "win" if first == "A" else "loss"


def pair_sample(question_id: str, rows: Mapping[str, Mapping[str, Any]], **known: Any) -> Sample:
    """Return a comparison as a sample.

    Args:
        question_id: id of the question.
        rows: the stored judgments by order ("AB", "BA").
        known: further fields of the sample: turn, draw, category, lengths, texts.
    """
    both = [rows.get(order) for order in ORDERS]
    verdicts = tuple("missing" if row is None else _verdict(row) for row in both)
    outcome = outcome_of(verdicts)
    return Sample(
        question_id,
        value=SCORE.get(outcome),
        outcome=outcome,
        verdicts=verdicts,
        by_rule=any(row is not None and row["source"] == "rule" for row in both),
        raws=tuple(None if row is None else _raw(row) for row in both),
        **known,
    )


def grade_sample(question_id: str, row: Mapping[str, Any] | None, **known: Any) -> Sample:
    """Return a grade as a sample; arguments as for `pair_sample`."""
    if row is None:
        return Sample(question_id, verdicts=("missing",), **known)
    value = float(row["value"]) if row["status"] == "ok" else None
    return Sample(
        question_id,
        value=value,
        outcome=UNRESOLVED if value is None else "graded",
        verdicts=(_verdict(row),),
        by_rule=row["source"] == "rule",
        raws=(_raw(row),),
        **known,
    )


def _verdict(row: Mapping[str, Any]) -> str:
    return str(row["value"] if row["status"] == "ok" else row["status"])


def _raw(row: Mapping[str, Any]) -> str | None:
    """What the judge wrote; for a judge that gives probabilities those, for a verdict by rule its
    reason.
    """
    if row["source"] == "rule":
        return f"decided without the judge: {row.get('reason') or 'by rule'}"
    if row.get("probabilities"):
        return ", ".join(f"{token} {value:.4f}" for token, value in row["probabilities"].items())
    return row.get("raw")


@dataclass(frozen=True)
class Rate:
    """A mean with its interval over questions, and what it would be if everything unresolved had
    got the lowest, and the highest value.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unresolved: int
    lowest: float | None
    highest: float | None

    @classmethod
    def of(cls, samples: Sequence[Sample], unit: str = "share") -> Rate:
        """Return the mean of samples; those of one question are one observation."""
        known = [(one.value, one.same_as or one.id) for one in samples if one.value is not None]
        values, clusters = [value for value, _ in known], [name for _, name in known]
        interval = interval_of(values, clusters, unit)
        missing, total = len(samples) - len(values), sum(values)
        least, most = UNIT_SCALES.get(unit, (0.0, 0.0))
        bounded = unit in UNIT_SCALES and bool(samples)
        return cls(
            interval.estimate,
            interval.low,
            interval.high,
            len(values),
            missing,
            (total + missing * least) / len(samples) if bounded else None,
            (total + missing * most) / len(samples) if bounded else None,
        )


def interval_of(values: Sequence[float], clusters: Sequence[str], unit: str) -> Interval:
    """Return the mean of values with its interval over clusters, inside the unit's scale."""
    if not values:
        return Interval()
    if unit in UNIT_SCALES:
        ends = mean_interval(values, clusters, UNIT_SCALES[unit])
    else:
        ends = estimate(np.array([values], dtype=float), clusters).interval()
    low, high = ends or (None, None)
    return Interval(math.fsum(values) / len(values), low, high, len(values))


def metric_of(
    metric: str,
    label: str,
    samples: Sequence[Sample],
    unit: Literal["share", "grade", "number"] = "share",
    **known: Any,
) -> Metric:
    """Return a metric that is the mean of samples."""
    rate = Rate.of(samples, unit)
    return Metric(
        metric,
        label,
        tuple(samples),
        unit=unit,
        value=rate.value,
        low=rate.low,
        high=rate.high,
        n=rate.n,
        **known,
    )


def counts_of(samples: Sequence[Sample]) -> dict[str, int]:
    """Return how many samples won, lost, tied and are unresolved."""
    counts = Counter(one.outcome for one in samples)
    return {name: counts[name] for name in (*SCORE, UNRESOLVED)}


def swap_consistency(samples: Sequence[Sample]) -> Interval:
    """Return the share of judged pairs where both orders name the same answer, or both say tie."""
    judged = [one for one in samples if one.resolved and not one.by_rule]
    same = [float(set(one.verdicts) in ({"A", "B"}, {"tie"})) for one in judged]
    return interval_of(same, [one.id for one in judged], "share")


def first_position(samples: Sequence[Sample]) -> Interval:
    """Return the share of verdicts for Response A over pairs that the judge answered in both
    orders: 0.5 without position bias.
    """
    judged = [one for one in samples if one.resolved and not one.by_rule]
    place = {"A": 1.0, "B": 0.0}
    first = [sum(place.get(verdict, 0.5) for verdict in one.verdicts) / 2 for one in judged]
    return interval_of(first, [one.id for one in judged], "share")


# ---- numbers in tables ----


def percent(value: float | None) -> str:
    """Return a share in percent."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def shown_rate(rate: Rate | Metric, digits: int = 2, unit: str = "share") -> str:
    """Return a value with its interval, a share in percent."""
    if rate.value is None:
        return "n/a"
    scale, digits = (100, 1) if unit == "share" else (1, digits)
    sign = "%" if unit == "share" else ""
    if rate.low is None or rate.high is None:
        return f"{scale * rate.value:.{digits}f}{sign}"
    limits = f"[{scale * rate.low:.{digits}f}, {scale * rate.high:.{digits}f}]"
    return f"{scale * rate.value:.{digits}f}{sign} {limits}"
