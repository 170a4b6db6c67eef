"""From verdicts in both orders to outcomes per sample, and from outcomes to rates with bounds.

The rule, for a comparison of a candidate with an opponent: the candidate is Response A in order
"AB" and Response B in order "BA". When both verdicts are ok, the sample is a win or a loss if they
name the same answer, and a tie if they do not. A sample with a verdict that is missing or not ok is
unresolved; it is counted in n and enters the bounds, once as lost and once as won.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, cast

from recipes_lib.eval_log import ORDERS, SCORE, Sample
from recipes_lib.statistics.intervals import (
    Interval,
    RateBounds,
    StoredBounds,
    StoredInterval,
    rate_interval,
    share_interval,
    wilson,
)


class StoredPairs(TypedDict):
    """A `PairSummary` as a result holds it."""

    n: int
    win: int
    loss: int
    tie: int
    unresolved: int
    by_rule: int
    statuses: dict[str, int]
    win_rate: StoredInterval
    score: StoredInterval
    win_bounds: StoredBounds
    swap_consistency: StoredInterval
    first_position: StoredInterval
    score_bounds: dict[str, StoredInterval]


@dataclass(frozen=True)
class PairSummary:
    """A comparison's rates.

    `score` counts a tie as half a win. `swap_consistency` is the share of judged pairs where both
    orders name the same answer (or both say tie); `first_position` the share of verdicts for
    Response A over pairs that the judge answered in both orders, 0.5 without position bias.
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
    swap_consistency: Interval
    first_position: Interval
    score_bounds: dict[str, Interval]

    def to_dict(self) -> StoredPairs:
        """Return the fields as a JSON-ready dictionary."""
        return cast(StoredPairs, asdict(self))


def outcome_of(verdicts: Sequence[str]) -> str:
    """Return the outcome of the verdicts in order AB and BA: win, loss, tie, or unresolved where
    one of them is a status.

    Example:
        >>> outcome_of(("A", "B")), outcome_of(("A", "A")), outcome_of(("A", "empty"))
        ('win', 'tie', 'unresolved')
    """
    if not set(verdicts) <= {"A", "B", "tie"}:
        return "unresolved"
    first, second = verdicts
    return "tie" if first == second or "tie" in verdicts else "win" if first == "A" else "loss"


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
    outcome = outcome_of(said)
    return Sample(
        question_id,
        value=SCORE.get(outcome),
        outcome=outcome,
        verdicts=said,
        by_rule=any(row is not None and row.get("source") == "rule" for row in rows),
        raws=tuple(None if row is None else _raw(row) for row in rows),
        **known,
    )


def grade_sample(question_id: str, row: Mapping[str, Any], **known: Any) -> Sample:
    """Return a grade as a sample; arguments as for `pair_sample`."""
    value = float(row["value"]) if row["status"] == "ok" else None
    return Sample(
        question_id,
        value=value,
        outcome="unresolved" if value is None else "graded",
        verdicts=(_said(row),),
        by_rule=row.get("source") == "rule",
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
    mass = row.get("mass")
    return None if mass is None else f"probability mass on the verdicts {mass:.4f}"


def pair_samples(
    rows: Iterable[Mapping[str, Any]], question_ids: Sequence[str] = ()
) -> list[Sample]:
    """Return every question's comparison, in the order of their first row.

    Args:
        rows: stored judgments of one comparison; grades are left out, and of each question and
            order the newest row counts.
        question_ids: questions that should be there; one without any row is unresolved.
    """
    by_question: dict[str, dict[str, Mapping[str, Any]]] = {name: {} for name in question_ids}
    for row in rows:
        if row.get("kind", "relative") == "relative":
            by_question.setdefault(str(row["question_id"]), {})[row["order"]] = row
    return [pair_sample(question_id, verdicts) for question_id, verdicts in by_question.items()]


def summarise(
    samples: Sequence[Sample], cluster_of: Callable[[Sample], Any] | None = None
) -> PairSummary:
    """Return a comparison's rates, intervals and bounds.

    Args:
        samples: one per pair of answers.
        cluster_of: the cluster of a sample, where several belong to one question (turns, draws).
    """
    counts = Counter(one.outcome for one in samples)
    said = (said for one in samples for said in one.verdicts)
    statuses = Counter("ok" if one in ("A", "B", "tie") else one for one in said)
    resolved = [one for one in samples if one.resolved]
    judged = [one for one in resolved if not one.by_rule]
    # the same answer named in both orders, or a tie in both
    consistent = sum(set(one.verdicts) in ({"A", "B"}, {"tie"}) for one in judged)
    place = {"A": 1.0, "B": 0.0}
    first = [sum(place.get(said, 0.5) for said in one.verdicts) / 2 for one in judged]

    def clusters_of(some: Sequence[Sample]) -> list[Any] | None:
        return None if cluster_of is None else [cluster_of(one) for one in some]

    def share(some: Sequence[Sample], *outcomes: str) -> Interval:
        return share_interval([one.outcome in outcomes for one in some], clusters_of(some))

    def score(some: Sequence[Sample], missing: float) -> Interval:
        values = [missing if one.value is None else one.value for one in some]
        return rate_interval(values, clusters_of(some))

    lost, won = share(samples, "win"), share(samples, "win", "unresolved")
    return PairSummary(
        n=len(samples),
        win=counts["win"],
        loss=counts["loss"],
        tie=counts["tie"],
        unresolved=counts["unresolved"],
        by_rule=sum(one.by_rule for one in samples),
        statuses=dict(statuses),
        win_rate=share(resolved, "win"),
        score=score(resolved, 0.5),
        win_bounds=RateBounds.between(lost, won, counts["unresolved"]),
        swap_consistency=wilson(consistent, len(judged)),
        first_position=rate_interval(first),
        score_bounds={"all_lost": score(samples, 0.0), "all_won": score(samples, 1.0)},
    )
