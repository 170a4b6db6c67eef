"""MT-Bench: context in the second turn, references where needed, nothing vanishing from a mean,
FastChat's formats.
"""

from __future__ import annotations

import pytest

from recipes_lib.engine import Completion
from recipes_lib.suites.answering import AnswerSet
from recipes_lib.suites.mt_bench import (
    conversation,
    draw_grades,
    grading_items,
    pair_items,
    summary,
)
from recipes_lib.suites.questions import Question

MATH = Question("7", ("Add 2 and 2.", "Add 1."), "math", ("4", "5"))
TALK = Question("8", ("Say hello.", "Say it louder."), "writing")


def answers(name, **texts):
    rows = {}
    for key, text in texts.items():
        question, turn = key.lstrip("q").split("_")
        rows[question, int(turn), 1] = Completion(key=key, text=text)
    return AnswerSet(name, None, rows)


MINE = answers("mine", q7_1="four", q7_2="five", q8_1="Hello.", q8_2="HELLO!")
OTHER = answers("other", q7_1="3", q7_2="", q8_1="Hi.", q8_2="HI!")


def grade(name, value, status="ok"):
    return {
        "kind": "absolute",
        "question_id": name,
        "order": "single",
        "status": status,
        "value": value,
        "raw": f"[RESULT] {value}",
    }


def test_a_second_turn_is_shown_with_the_first_one_before_it():
    text = conversation(TALK, MINE, 2)
    assert text.index("Say hello.") < text.index("Hello.") < text.index("Say it louder.")
    assert "HELLO!" not in text
    assert conversation(TALK, MINE, 1) == "Say hello."


def test_references_go_with_the_categories_that_need_them():
    with_reference, without = (
        grading_items([MATH, TALK], MINE, True),
        grading_items([MATH, TALK], MINE, False),
    )
    assert [(item.question_id, item.reference) for item in with_reference] == [
        ("7:1", "4"),
        ("7:2", "5"),
    ]
    assert [(item.question_id, item.reference) for item in without] == [
        ("8:1", None),
        ("8:2", None),
    ]


def test_both_conversations_are_compared_and_an_empty_second_answer_stays_empty():
    items = {item.question_id: item for item in pair_items([MATH, TALK], MINE, OTHER)}
    assert items["7:2"].opponent == "" and items["7:2"].reference == "5"
    assert items["8:2"].answer.index("Hello.") < items["8:2"].answer.index("HELLO!")
    assert "Question 2: Say it louder." in items["8:2"].instruction


def test_a_turn_without_a_grade_is_counted_and_bounds_the_mean():
    rows = [grade("7:1", 5), grade("7:2", 3), grade("8:1", 1), grade("8:2", None, "unparsed")]
    result = summary([MATH, TALK], rows)
    score = result["score"]
    assert (score["n"], score["turns"], score["without_grade"], score["estimate"]) == (3, 4, 1, 3.0)
    assert score["bounds"] == {"all_1": 2.5, "all_5": 3.5}
    assert score["doubled_2_10"] == 6.0 and score["scale"] == "1-5"
    assert (
        result["by_turn"]["2"]["turns"] == 2
        and result["by_category"]["writing"]["2"]["estimate"] is None
    )
    missing = summary([MATH, TALK], rows[:2])
    assert missing["score"]["without_grade"] == 2


@pytest.mark.parametrize("rows", [[], [grade("7:1", None, "error")]])
def test_no_grade_at_all_is_no_number_and_no_crash(rows):
    score = summary([MATH], rows)["score"]
    assert score["estimate"] is None and score["bounds"] == {"all_1": 1.0, "all_5": 5.0}


def test_the_turns_of_a_question_are_one_cluster_and_not_two_observations():
    questions = [Question(str(number), ("a", "b"), "writing") for number in range(20)]
    rows = [grade(f"{number}:{turn}", 1 + number % 5) for number in range(20) for turn in (1, 2)]
    both, first = (
        summary(questions, rows)["score"],
        summary([Question(q.id, ("a",), "writing") for q in questions], rows[::2])["score"],
    )
    assert both["high"] - both["low"] == pytest.approx(
        first["high"] - first["low"], rel=0.02
    )  # a second turn that says the same adds nothing
    won = [
        {
            "kind": "relative",
            "question_id": f"{number}:{turn}",
            "order": order,
            "status": "ok",
            "value": winner,
        }
        for number in range(20)
        for turn in (1, 2)
        for order, winner in zip(("AB", "BA"), "BA" if number % 3 == 0 else "AB", strict=True)
    ]
    pairs = [
        summary(questions, [row for row in won if turns in ("both", row["question_id"][-1])])[
            "pairs"
        ]
        for turns in ("both", "1")
    ]
    both, first = (pair["score"] for pair in pairs)
    assert both["n"] == 2 * first["n"] and both["high"] - both["low"] == pytest.approx(
        first["high"] - first["low"], rel=0.02
    )


def test_limits_of_a_mean_stay_on_the_scale():
    rows = [grade("7:1", 5), grade("7:2", 1), grade("8:1", 5), grade("8:2", 4)]
    score = summary([MATH, TALK], rows)["score"]
    assert 1 <= score["low"] <= score["estimate"] <= score["high"] <= 5


def test_the_figure_of_grades_is_the_same_bytes_for_the_same_numbers_and_copes_with_missing_grades(
    tmp_path,
):
    def cell(estimate, low=None, high=None, n=2):
        return {"estimate": estimate, "low": low, "high": high, "n": n}

    writing = {"1": cell(3.5, 2.5, 4.5), "2": cell(None, n=0), "all": cell(3.5)}
    categories = {"writing": writing, "math": {"1": cell(1.0), "2": cell(5.0), "all": cell(3.0)}}
    numbers = {"by_category": categories, "by_turn": {"1": cell(2.25, 1.0, 4.0), "2": cell(5.0)}}
    files = [draw_grades(numbers, tmp_path / name / "grades", "a model") for name in ("one", "two")]
    assert [path.suffix for path in files[0]] == [".svg", ".png"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    empty = {
        "by_category": {"math": {"1": cell(None, n=0), "all": cell(None, n=0)}},
        "by_turn": {"1": cell(None, n=0)},
    }
    assert all(
        path.stat().st_size > 500
        for path in draw_grades(empty, tmp_path / "none" / "grades", "nothing graded")
    )
