"""A result's numbers under judge_replay's keys."""

from __future__ import annotations

from recipes_lib.judging.audit import audit
from recipes_lib.judging.outcomes import pair_samples, summarise
from recipes_lib.suites.judged import replay_numbers


def rows(verdicts):
    """Stored judgments: {question: (status or verdict in AB, in BA)}."""
    return [
        {
            "kind": "relative",
            "question_id": name,
            "order": order,
            "status": "ok" if said in ("A", "B") else said,
            "value": said if said in ("A", "B") else None,
            "source": "judge",
            "judge": "x",
            "lengths": [5, 6],
            "marker_in_answer": False,
            "cut": False,
            "attempts": [],
            "meta": {},
            "raw": "",
        }
        for name, pair in verdicts.items()
        for order, said in zip(("AB", "BA"), pair, strict=True)
    ]


def numbers_of(verdicts):
    stored = rows(verdicts)
    pairs = summarise(pair_samples(stored)).to_dict()
    return replay_numbers({"pairs": pairs, "mean_score": None}, audit(stored))


def test_pairs_are_percent_of_what_is_resolved_and_the_bounds_are_of_all():
    numbers = numbers_of({"1": "AB", "2": "BA", "3": "AA", "4": ("A", "unparsed")})
    third = 100 / 3
    assert [round(numbers["recorded"][name], 6) for name in ("win", "loss", "tie")] == [
        round(third, 6)
    ] * 3
    assert numbers["recorded"]["n"] == 3 and numbers["unparsed"] == {"count": 1, "share": 1 / 8}
    assert (numbers["order"]["judged"], numbers["order"]["flips"]) == ("both", 1)
    assert numbers["bounds"] == {"of": "win percent", "all_lost": 25.0, "all_won": 50.0}


def test_grades_have_their_mean_and_no_order():
    grade = {
        "estimate": 3.5,
        "low": 3.0,
        "high": 4.0,
        "n": 9,
        "bounds": {"all_1": 3.25, "all_5": 3.75},
    }
    numbers = replay_numbers({"pairs": None, "score": grade}, audit([]))
    assert (
        numbers["recorded"]["mean_score"] == 3.5
        and numbers["recorded"]["n"] == 9
        and numbers["recorded"]["win"] is None
    )
    assert numbers["order"]["judged"] == "single-answer" and numbers["bounds"]["all_won"] == 3.75
    assert numbers["unparsed"] == {"count": 0, "share": 0.0}


def test_nothing_resolved_gives_no_percentage():
    numbers = numbers_of({"1": ("empty", "A")})
    assert numbers["recorded"]["win"] is None and numbers["recorded"]["n"] == 0
    assert numbers["bounds"] == {"of": "win percent", "all_lost": 0.0, "all_won": 100.0}
