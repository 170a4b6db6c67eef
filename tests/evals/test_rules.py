"""Rules over answers: what people and chat models write."""

import pytest

from recipes_lib.core.errors import DataError
from recipes_lib.evals.rules import RULES, AnswerRule, rule_of, see_form_alone

CHOICES = {
    "C": [
        *("C", "c", "(C)", "**C**", "C.", "C) Paris", "C: Paris", "C - Paris", "\\boxed{C}"),
        *("Answer: C", "Answer: (C)", "answer: c", "Answer - C", "The answer is **C**"),
        *("It is C.", "I think it is C.", "I believe it's C.", "It’s C", "I choose C."),
        *("C is correct", "C is the right answer.", "The correct answer is option C."),
        *("The answer is C: Paris", "The answer is C because it is the capital."),
        *("The best option I can see is C.", "Option C is correct because A is wrong"),
        "**C) Paris**\n\nParis is the capital; A and B are not.",
        "The answer is a river, C.\n\nC",
        "A and B are rivers.\n\nThe answer is C",
    ],
    "": [
        *("", "A or C", "Paris", "It is a good day.", "I am not sure.", "Cats are nice."),
        *("The answer is A or the answer is C", "A is correct. C is correct.", "It's a city."),
        *("It is an option I like.", "It's I who knows.", "The answer is a city."),
    ],
    "A": ["A", "The answer is A", "A. Rome", "It is A.", "Answer: A"],
    "I": ["I", "The answer is I.", "I) iodine"],
}


def test_a_choice_is_the_letter_that_the_answer_names():
    wrong = [
        (answer, letter, expected)
        for expected, answers in CHOICES.items()
        for answer in answers
        for letter in "ABCI"
        if AnswerRule(check="choice", expected=letter).passes(answer) != (letter == expected)
    ]
    assert not wrong


def test_a_number_is_the_last_one_and_a_dash_between_digits_is_no_sign():
    cases = {
        "2024-05-17": 17,
        "3-5": 5,
        "pages 10–12": 12,
        "x = -3": -3,
        "x = \u22123": -3,
        "3\u22125": 5,
        "(-3)": -3,
        "3 - 5 = -2": -2,
        "It costs $1,234.50": 1234.5,
        "2e-3": 0.002,
        " .5": 0.5,
        "42.": 42,
        "The answer is 42 apples, not 17... 42": 42,
    }
    wrong = [
        text
        for text, value in cases.items()
        if not AnswerRule(check="number", expected=value).passes(text)
    ]
    assert not wrong
    assert not AnswerRule(check="number", expected=5).passes("none")
    assert AnswerRule(check="number", expected=3.14, tolerance=0.01).passes("about 3.1416")


def test_the_other_rules():
    cases = [
        (AnswerRule(check="exact", expected=["Paris", "paris"]), " Paris\n", True),
        (AnswerRule(check="exact", expected="Paris"), "Paris.", False),
        (AnswerRule(check="regex", expected="(?i)^PARIS$"), "Paris", True),
        (AnswerRule(check="contains", expected=["a", "b"]), "b a", True),
        (AnswerRule(check="contains", expected=["a", "c"]), "b a", False),
        (AnswerRule(check="regex", expected="^In short: .+$"), "In short: yes", True),
    ]
    assert {rule.check for rule, _, _ in cases} | {"number", "choice"} == RULES.keys()
    assert [(rule, text) for rule, text, passes in cases if rule.passes(text) != passes] == []


def test_a_check_that_cannot_work_is_refused_when_the_rows_are_read():
    wrong = [
        {},
        {"check": "exactly", "expected": "a"},
        {"check": "exact", "expected": ""},
        {"check": "choice", "expected": "AB"},
        {"check": "regex", "expected": "("},
        {"check": "number", "expected": True},
        {"check": "number", "expected": 3, "tolerance": -1},
        {"check": "number", "expected": 3, "tolerence": 1},
    ]
    for row in wrong:
        with pytest.raises(DataError):
            rule_of(row)
            pytest.fail(str(row))


def test_rules_that_a_fixed_answer_meets_are_found():
    """A format asked of every question, one letter nearly always, or words that lie in all."""
    style = AnswerRule(check="regex", expected="^In short: .+$")
    assert see_form_alone([[style]] * 60, [])
    letters = [AnswerRule(check="choice", expected=letter) for letter in "ABCD" * 15]
    assert not see_form_alone([[rule] for rule in letters], ["A", "B", "C", "D"])
    often = [AnswerRule(check="choice", expected="C")] * 55 + letters[:5]
    assert see_form_alone([[rule] for rule in often], [])
    forms = [AnswerRule(check="regex", expected=f"^.{{{n},}}$") for n in range(10)]
    assert see_form_alone([[rule] for rule in forms], ["a long answer"])
    assert not see_form_alone([[rule] for rule in forms], ["short"])
    numbers = [AnswerRule(check="number", expected=n) for n in range(60)]
    assert not see_form_alone([[rule] for rule in numbers], [str(n) for n in range(60)])
    assert not see_form_alone([[style]] * 2, ["In short: yes"])  # two rows say nothing
