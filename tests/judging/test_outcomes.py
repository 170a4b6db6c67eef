"""Two orders make an outcome; a verdict that is missing makes a bound, never a tie."""

from __future__ import annotations

import itertools
import json

import pytest

from recipes_lib.judging.outcomes import pair_sample, pair_samples, summarise


def _ok(value: str) -> dict:
    return {"status": "ok", "value": value}


def _rows(*pairs: tuple[str, str]) -> list[dict]:
    return [
        {"question_id": str(index), "order": order, "kind": "relative"}
        | (_ok(value) if value in ("A", "B", "tie") else {"status": value, "value": None})
        for index, pair in enumerate(pairs)
        for order, value in zip(("AB", "BA"), pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("A", "B", "win"),
        ("B", "A", "loss"),
        ("A", "A", "tie"),
        ("B", "B", "tie"),
        ("tie", "tie", "tie"),
        ("A", "tie", "tie"),
        ("tie", "A", "tie"),
    ],
)
def test_outcome_of_two_ok_verdicts(first: str, second: str, outcome: str) -> None:
    assert pair_sample("q", {"AB": _ok(first), "BA": _ok(second)}).outcome == outcome


@pytest.mark.parametrize("status", ["unparsed", "refused", "empty", "truncated", "error"])
def test_any_other_status_leaves_the_item_unresolved(status: str) -> None:
    bad = {"status": status, "value": None}
    for first, second in itertools.product([bad], [bad, _ok("A")]):
        assert pair_sample("q", {"AB": first, "BA": second}).outcome == "unresolved"
        assert pair_sample("q", {"AB": second, "BA": first}).outcome == "unresolved"


def test_a_missing_order_is_unresolved_and_so_is_a_question_without_rows() -> None:
    assert pair_sample("q", {"AB": _ok("A")}).verdicts == ("A", "missing")
    outcomes = pair_samples(_rows(("A", "B")), question_ids=["0", "1"])
    assert [item.outcome for item in outcomes] == ["win", "unresolved"]


def test_pairs_that_all_came_out_alike_leave_room_for_another() -> None:
    won = summarise(pair_samples(_rows(*[("A", "B")] * 20)))
    assert won.score.estimate == won.score.high == 1.0 and 0.8 < won.score.low < 0.9
    tied = summarise(pair_samples(_rows(*[("B", "B")] * 24)))  # no width would be no doubt
    assert (tied.score.estimate, tied.score.low, tied.score.high) == (0.5, None, None)
    assert tied.first_position.estimate == 0.0 and 0.1 < tied.first_position.high < 0.2


def test_unresolved_items_stay_in_n_and_widen_the_bounds() -> None:
    summary = summarise(
        pair_samples(_rows(*[("A", "B")] * 6, *[("B", "A")] * 2, ("unparsed", "B"), ("A", "error")))
    )
    assert (summary.n, summary.win, summary.loss, summary.tie, summary.unresolved) == (
        10,
        6,
        2,
        0,
        2,
    )
    assert (summary.win_bounds.all_lost, summary.win_bounds.all_won) == (0.6, 0.8)
    assert summary.win_rate.estimate == 0.75 and summary.win_rate.n == 8
    assert (
        summary.score_bounds["all_lost"].estimate == 0.6
        and summary.score_bounds["all_won"].estimate == 0.8
    )
    assert summary.statuses == {"ok": 18, "unparsed": 1, "error": 1}
    json.dumps(summary.to_dict())


def test_a_judge_that_always_says_a_has_full_position_bias_and_no_consistency() -> None:
    summary = summarise(pair_samples(_rows(*[("A", "A")] * 40)))
    assert summary.first_position.estimate == 1.0
    assert summary.swap_consistency.estimate == 0.0
    assert summary.score.estimate == 0.5 and summary.tie == 40


def test_a_consistent_judge_has_no_position_bias() -> None:
    summary = summarise(pair_samples(_rows(*[("A", "B")] * 10, *[("B", "A")] * 10)))
    assert summary.first_position.estimate == 0.5
    assert summary.swap_consistency.estimate == 1.0


def test_items_decided_by_rule_say_nothing_about_the_judge() -> None:
    rows = [row | {"source": "rule"} for row in _rows(("A", "B"))]
    summary = summarise(pair_samples(rows))
    assert summary.win == summary.by_rule == 1
    assert (
        summary.swap_consistency.n == summary.first_position.n == 0
        and summary.swap_consistency.estimate is None
    )


def test_position_bias_is_measured_on_items_that_the_judge_answered_in_both_orders() -> None:
    summary = summarise(pair_samples(_rows(*[("A", "A")] * 10, *[("B", "unparsed")] * 10)))
    assert summary.first_position.n == 10 and summary.first_position.estimate == 1.0


def test_no_item_and_one_item_do_not_crash() -> None:
    assert summarise([]).score.estimate is None
    one = summarise(pair_samples(_rows(("A", "B"))))
    assert one.score.estimate == 1.0 and one.score.low < 0.25  # one pair says next to nothing


def test_turns_of_one_question_are_one_cluster() -> None:
    outcomes = pair_samples(_rows(*[("A", "B"), ("B", "A"), ("A", "A")] * 30))
    single = summarise(outcomes).score
    clustered = summarise(outcomes, cluster_of=lambda one: int(one.id) % 45).score
    assert clustered.estimate == single.estimate and (clustered.low, clustered.high) != (
        single.low,
        single.high,
    )
