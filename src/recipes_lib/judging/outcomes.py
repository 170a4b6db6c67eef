"""From verdicts in both orders to outcomes per sample, and from outcomes to rates with bounds.

The rule, for a comparison of a candidate with an opponent: the candidate is Response A in order
"AB" and Response B in order "BA". When both verdicts are ok, the sample is a win or a loss if they
name the same answer, and a tie if they do not. A sample with a verdict that is missing or not ok is
unresolved; it is counted in n and enters the bounds, once as lost and once as won.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.eval_log import ORDERS, SCORE, Sample
from recipes_lib.statistics.intervals import (
    Interval,
    RateBounds,
    mean_interval,
    rate_bounds,
    wilson,
)


@dataclass(frozen=True)
class PairSummary:
    """A comparison's rates. `score` counts a tie as half a win; `first_position` is the share of
    verdicts for Response A.
    """

    n: int
    win: int
    loss: int
    tie: int
    unresolved: int
    by_rule: int
    statuses: dict[str, int]
    win_rate: Interval
    score: Interval
    win_bounds: RateBounds
    score_bounds: tuple[Interval, Interval]
    swap_consistency: Interval
    first_position: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        counts = {
            name: getattr(self, name)
            for name in ("n", "win", "loss", "tie", "unresolved", "by_rule", "statuses")
        }
        intervals = {
            name: getattr(self, name).to_dict()
            for name in ("win_rate", "score", "win_bounds", "swap_consistency", "first_position")
        }
        bounds = {
            "all_lost": self.score_bounds[0].to_dict(),
            "all_won": self.score_bounds[1].to_dict(),
        }
        return counts | intervals | {"score_bounds": bounds}


def pair_sample(
    question_id: str, verdicts: Mapping[str, Mapping[str, Any]], **known: Any
) -> Sample:
    """Return a comparison as a sample.

    Args:
        question_id: id of the question.
        verdicts: the stored rows by order ("AB", "BA"); the value "tie" stands for a judge's own
            tie.
        known: further fields of the sample: turn, category, lengths, texts.

    Example:
        >>> pair_sample("q", {"AB": {"status": "ok", "value": "A"}, "BA": {"status": "ok", "value": "B"}}).outcome
        'win'
    """  # noqa: E501
    rows = [verdicts.get(order) for order in ORDERS]
    said = tuple("missing" if row is None else _said(row) for row in rows)
    outcome = "unresolved"
    if all(row is not None and row["status"] == "ok" for row in rows):
        winners = (
            {"A": "win", "B": "loss"}.get(said[0], "tie"),
            {"A": "loss", "B": "win"}.get(said[1], "tie"),
        )
        outcome = winners[0] if winners[0] == winners[1] else "tie"
    by_rule = any(row is not None and row.get("source") == "rule" for row in rows)
    raws = tuple(None if row is None else _raw(row) for row in rows)
    return Sample(
        question_id,
        value=SCORE.get(outcome),
        outcome=outcome,
        verdicts=said,
        by_rule=by_rule,
        raws=raws,
        **known,
    )


def grade_sample(question_id: str, row: Mapping[str, Any], **known: Any) -> Sample:
    """Return a grade as a sample; arguments as for `pair_sample`."""
    value = float(row["value"]) if row["status"] == "ok" else None
    outcome, by_rule = "unresolved" if value is None else "graded", row.get("source") == "rule"
    return Sample(
        question_id,
        value=value,
        outcome=outcome,
        verdicts=(_said(row),),
        by_rule=by_rule,
        raws=(_raw(row),),
        **known,
    )


def _said(row: Mapping[str, Any]) -> str:
    return str(row["value"] if row["status"] == "ok" else row["status"])


def _raw(row: Mapping[str, Any]) -> str | None:
    """What the judge wrote; for a judge that gives probabilities those, for a verdict by rule its
    reason.
    """
    if row.get("raw") is not None:
        return str(row["raw"])
    if row.get("source") == "rule":
        return f"decided without the judge: {row.get('reason') or 'by rule'}"
    if row.get("probabilities"):
        return ", ".join(f"{token} {value:.4f}" for token, value in row["probabilities"].items())
    return (
        f"probability mass on the verdicts {row['mass']:.4f}"
        if row.get("mass") is not None
        else None
    )


def pair_samples(
    rows: Iterable[Mapping[str, Any]], question_ids: Sequence[str] | None = None
) -> list[Sample]:
    """Return every question's comparison, in the order of their first row.

    Args:
        rows: stored judgments of one comparison; those of another kind than "relative" are left
            out. The last row of a question and order counts, which is the newest.
        question_ids: all questions that should be there; one without any row is unresolved too.
    """
    by_question: dict[str, dict[str, Mapping[str, Any]]] = {
        question_id: {} for question_id in question_ids or ()
    }
    for row in rows:
        if row.get("kind", "relative") == "relative":
            by_question.setdefault(str(row["question_id"]), {})[row["order"]] = row
    return [pair_sample(question_id, verdicts) for question_id, verdicts in by_question.items()]


def _first_position(samples: Sequence[Sample]) -> Interval:
    """Share of verdicts for Response A over pairs that the judge answered in both orders; 0.5 for a
    judge without position bias.
    """
    share = {"A": 1.0, "B": 0.0}
    values = [
        sum(share.get(said, 0.5) for said in one.verdicts) / 2
        for one in samples
        if one.resolved and not one.by_rule
    ]
    return mean_interval(values).within(0, 1)


def swap_consistency(samples: Sequence[Sample]) -> Interval:
    """Return the share of judged pairs where both orders name the same answer (or both say tie)."""
    judged = [one for one in samples if one.resolved and not one.by_rule]
    same = sum(set(one.verdicts) in ({"A", "B"}, {"tie"}) for one in judged)
    return wilson(same, len(judged))


def summarise(
    samples: Sequence[Sample], cluster_of: Callable[[Sample], Any] | None = None
) -> PairSummary:
    """Return a comparison's rates, intervals and bounds.

    Args:
        samples: one per pair of answers.
        cluster_of: the cluster of a sample, where several belong to one question (turns, seeds).
    """
    counts = Counter(one.outcome for one in samples)
    statuses = Counter(
        "ok" if said in ("A", "B", "tie") else said for one in samples for said in one.verdicts
    )
    resolved = [one for one in samples if one.resolved]

    def interval(some: Sequence[Sample], missing: float) -> Interval:
        clusters = None if cluster_of is None else [cluster_of(one) for one in some]
        return mean_interval(
            [missing if one.value is None else one.value for one in some], clusters
        ).within(0, 1)

    return PairSummary(
        n=len(samples),
        win=counts["win"],
        loss=counts["loss"],
        tie=counts["tie"],
        unresolved=counts["unresolved"],
        by_rule=sum(one.by_rule for one in samples),
        statuses=dict(statuses),
        win_rate=wilson(counts["win"], len(resolved)),
        score=interval(resolved, 0.5),
        win_bounds=rate_bounds(counts["win"], len(samples), counts["unresolved"]),
        score_bounds=(interval(samples, 0.0), interval(samples, 1.0)),
        swap_consistency=swap_consistency(samples),
        first_position=_first_position(samples),
    )
