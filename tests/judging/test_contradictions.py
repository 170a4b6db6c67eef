"""The judge's own words: which sentences decide, which do not, and what the original study's judge
said.
"""

from __future__ import annotations

import pytest

from recipes_lib.judging.contradictions import find_contradictions, stated_score, stated_winner


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("Therefore, Response B is significantly better than Response A. \n[Overall] 5", "B"),
        (
            (
                "Response A is deemed to be better than Response B because it is exact. So the"
                " overall score is 4."
            ),
            "A",
        ),
        (
            (
                "Response A is significantly worse than Response B due to its lack of detail."
                " [Final Score: 1]"
            ),
            "B",
        ),
        ("Response B is inferior to Response A.", "A"),
        (
            (
                "This detail makes Response A slightly better than Response B. Both could be"
                " improved. [Overall] 4"
            ),
            "A",
        ),
        (
            (
                "Response A offers more detail, making it the superior response according to the"
                " rubric."
            ),
            "A",
        ),
        ("Response B appears to be superior to Response A.", "B"),
        ("Response B outperforms Response A in depth.", "B"),
        ("Response A is less effective than Response B.", "B"),
        (
            (
                "Response A is better in style. Overall, however, Response B is superior to"
                " Response A."
            ),
            "B",
        ),
    ],
)
def test_words_that_decide(text: str, winner: str) -> None:
    assert stated_winner(text) == winner


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Both responses are good. So the overall score is 3.",
        "Neither response is better than the other.",
        "Response A is not better than Response B.",
        "Response B could be better than Response A.",
        "If it were longer, Response B would be better.",
        "Response A is better than Response B, and Response B is better than Response A.",
        "Response A and Response B are equally good.",
    ],
)
def test_words_that_do_not_decide(text: str) -> None:
    assert stated_winner(text) is None


def test_a_stated_score_is_the_overall_one_and_not_a_mention_of_the_rubric() -> None:
    assert stated_score("So the overall score is 4. [RESULT] 3") == 4
    assert stated_score("It does not meet the criteria for a score of 5. [RESULT] 3") is None
    assert stated_score("[RESULT] overall score is 4") is None


def test_rate_and_direction_count_only_decidable_rows() -> None:
    rows = [("Response B is better than Response A.", "A")] * 3 + [
        ("Response A is better than Response B.", "A"),
        ("Fine.", "A"),
    ]
    rows += [
        ("Response A is better than Response B.", "B"),
        ("Response A is better than Response B.", None),
        ("So-so", "Tie"),
    ]
    found = find_contradictions(rows)
    assert [found[key] for key in ("n", "decidable", "count", "for_first")] == [8, 5, 4, 3]
    assert found["rate"] == 0.8 and found["direction"] == "3 of 4 favour Response A"


def test_grades_are_compared_with_the_stated_score() -> None:
    found = find_contradictions(
        [("The overall score is 4. [RESULT] 5", 5), ("The overall score is 4. [RESULT] 4", 4)]
    )
    assert (found["count"], found["direction"]) == (
        1,
        "1 of 1 favour a higher score than the words",
    )


def test_nothing_to_compare_has_no_rate() -> None:
    assert find_contradictions([])["rate"] is None
    assert find_contradictions([("x", None)])["direction"] is None
