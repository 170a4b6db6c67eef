"""From verdicts in both orders to outcomes per item, and from outcomes to rates with bounds.

The rule, for a comparison of a candidate with an opponent: the candidate is Response A in order "AB" and Response B in order
"BA". When both verdicts are ok, the item is a win or a loss if they name the same answer, and a tie if they do not. An item with
a verdict that is missing or not ok is unresolved; it is counted in n and enters the bounds, once as lost and once as won.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.statistics.intervals import Interval, RateBounds, mean_interval, rate_bounds, wilson

ORDERS = ("AB", "BA")
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class ItemOutcome:
    """One question: what the two orders said (a verdict, or the status of the missing one) and what follows."""

    question_id: str
    outcome: str
    first: str
    second: str
    by_rule: bool = False

    @property
    def resolved(self) -> bool:
        """Whether both orders gave a verdict."""
        return self.outcome != "unresolved"


@dataclass(frozen=True)
class PairSummary:
    """A comparison's rates. `score` counts a tie as half a win; `first_position` is the share of verdicts for Response A."""

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
        counts = {name: getattr(self, name) for name in ("n", "win", "loss", "tie", "unresolved", "by_rule", "statuses")}
        intervals = {
            name: getattr(self, name).to_dict() for name in ("win_rate", "score", "win_bounds", "swap_consistency", "first_position")
        }
        bounds = {"all_lost": self.score_bounds[0].to_dict(), "all_won": self.score_bounds[1].to_dict()}
        return counts | intervals | {"score_bounds": bounds}


def item_outcome(question_id: str, verdicts: Mapping[str, Mapping[str, Any]]) -> ItemOutcome:
    """Return the outcome of one question.

    Args:
        question_id: id of the question.
        verdicts: the stored rows by order ("AB", "BA"); the value "tie" stands for a judge's own tie.

    Example:
        >>> item_outcome("q", {"AB": {"status": "ok", "value": "A"}, "BA": {"status": "ok", "value": "B"}}).outcome
        'win'
    """
    seen = [verdicts.get(order) for order in ORDERS]
    shown = [("missing" if row is None else str(row["value"]) if row["status"] == "ok" else str(row["status"])) for row in seen]
    by_rule = any(row is not None and row.get("source") == "rule" for row in seen)
    if any(row is None or row["status"] != "ok" for row in seen):
        return ItemOutcome(question_id, "unresolved", shown[0], shown[1], by_rule)
    winners = [{"A": "win", "B": "loss"}.get(shown[0], "tie"), {"A": "loss", "B": "win"}.get(shown[1], "tie")]
    return ItemOutcome(question_id, winners[0] if winners[0] == winners[1] else "tie", shown[0], shown[1], by_rule)


def pair_outcomes(rows: Iterable[Mapping[str, Any]], question_ids: Sequence[str] | None = None) -> list[ItemOutcome]:
    """Return the outcome of every question, in the order of their first row.

    Args:
        rows: stored judgments of one comparison; those of another kind than "relative" are left out. The last row of a question
            and order counts, which is the newest.
        question_ids: all questions that should be there; one without any row is unresolved too.
    """
    by_item: dict[str, dict[str, Mapping[str, Any]]] = {question_id: {} for question_id in question_ids or ()}
    for row in rows:
        if row.get("kind", "relative") == "relative":
            by_item.setdefault(str(row["question_id"]), {})[row["order"]] = row
    return [item_outcome(question_id, verdicts) for question_id, verdicts in by_item.items()]


def _first_position(outcomes: Sequence[ItemOutcome]) -> Interval:
    """Share of verdicts for Response A over items that the judge answered in both orders; 0.5 for a judge without position bias."""
    share = {"A": 1.0, "B": 0.0}
    values = [(share.get(item.first, 0.5) + share.get(item.second, 0.5)) / 2 for item in outcomes if item.resolved and not item.by_rule]
    return mean_interval(values).within(0, 1)


def swap_consistency(outcomes: Sequence[ItemOutcome]) -> Interval:
    """Return the share of judged items where both orders name the same answer (or both say tie)."""
    judged = [item for item in outcomes if item.resolved and not item.by_rule]
    same = sum({item.first, item.second} in ({"A", "B"}, {"tie"}) for item in judged)
    return wilson(same, len(judged))


def summarise(outcomes: Sequence[ItemOutcome], cluster_of: Callable[[str], Any] | None = None) -> PairSummary:
    """Return a comparison's rates, intervals and bounds.

    Args:
        outcomes: one per item.
        cluster_of: the cluster of a question id, where several items belong to one question (turns, seeds).
    """
    counts = Counter(item.outcome for item in outcomes)
    statuses = Counter("ok" if verdict in ("A", "B", "tie") else verdict for item in outcomes for verdict in (item.first, item.second))
    resolved = [item for item in outcomes if item.resolved]

    def interval(items: Sequence[ItemOutcome], missing: float) -> Interval:
        clusters = None if cluster_of is None else [cluster_of(item.question_id) for item in items]
        return mean_interval([SCORE.get(item.outcome, missing) for item in items], clusters).within(0, 1)

    return PairSummary(
        n=len(outcomes),
        win=counts["win"],
        loss=counts["loss"],
        tie=counts["tie"],
        unresolved=counts["unresolved"],
        by_rule=sum(item.by_rule for item in outcomes),
        statuses=dict(statuses),
        win_rate=wilson(counts["win"], len(resolved)),
        score=interval(resolved, 0.5),
        win_bounds=rate_bounds(counts["win"], len(outcomes), counts["unresolved"]),
        score_bounds=(interval(outcomes, 0.0), interval(outcomes, 1.0)),
        swap_consistency=swap_consistency(outcomes),
        first_position=_first_position(outcomes),
    )
