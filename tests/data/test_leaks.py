"""Rows that hold what an evaluation asks: what counts as a leak, and what does not."""

from recipes_lib.data.leaks import EvalText, Leaks, find_leaks
from recipes_lib.data.rows import DataRow

LONG = (
    "A farmer has 17 sheep, 3 dogs and 2 barns; all but 9 of the sheep run away in the night."
    " How many sheep does the farmer have left in the morning?"
)


def rows(*texts: str) -> list[DataRow]:
    return [
        DataRow("rows.jsonl", number, {"instruction": "Say it.", "response": text}, id=text)
        for number, text in enumerate(texts, 1)
    ]


def asked(*texts: str) -> list[EvalText]:
    return [EvalText(str(number), "question", text) for number, text in enumerate(texts, 1)]


def found(texts: list[EvalText], *of_rows: str) -> Leaks:
    return find_leaks(rows(*of_rows), {"eval": texts})["eval"]


def test_a_long_question_is_found_whatever_its_case_marks_white_space_and_surroundings() -> None:
    leaks = found(asked(LONG), "Hello.", f"Q:\n {LONG.upper().replace(' ', '  ').strip('?')} A: 9")
    (leak,) = leaks.found
    assert (leak.place, leak.question, leak.share) == ("rows.jsonl:2", "1", 1.0)
    assert leaks.is_error and (leaks.leaked_rows, leaks.leaked_questions, leaks.rows) == (1, 1, 2)


def test_a_question_without_spaces_is_found_by_its_characters() -> None:
    for question in (
        "请用简单的语言解释光合作用的过程，并举一个日常生活中的例子。",
        "ช่วยอธิบายว่าทำไมท้องฟ้าจึงเป็นสีฟ้าในเวลากลางวัน",
    ):
        leaks = found(asked(question), f"ABC {question} 123", question[: len(question) // 3])
        (leak,) = leaks.found
        assert (leak.place, leak.share, leak.short) == ("rows.jsonl:1", 1.0, False)
        beginning = question[: len(question) * 3 // 4]
        assert 0.5 <= found(asked(question), f"{beginning}42").found[0].share < 1
        assert not found(asked(question), question[::-1], question[: len(question) // 2]).found
    assert found(asked("中国的首都是哪里？"), "中国的首都，是哪里").found[0].short
    assert not found(asked("中国的首都是哪里？"), "他问我中国的首都是哪里。").found


def test_half_of_a_questions_thirteen_grams_are_a_leak_and_fewer_are_none() -> None:
    words = LONG.split()  # 32 words, so 20 13-grams; the first 22 words hold 10 of them
    assert found(asked(LONG), " ".join(words[:22])).found[0].share == 0.5
    assert not found(asked(LONG), " ".join(words[:21])).found
    assert not found(asked(LONG), " ".join(reversed(words))).found


def test_a_template_around_every_question_is_no_leak() -> None:
    template = "Sort the following ticket into one of the classes billing, outage, praise: {}."
    texts = asked(*(template.format(f"{name} called about it") for name in ("Ann", "Bob", "Cy")))
    assert not found(texts, template.format("Dora called about it")).found
    assert [leak.question for leak in found(texts, texts[1].text).found] == ["2"]
    twice = found(asked(LONG, LONG, "Why?"), LONG).found
    assert [leak.question for leak in twice] == ["1", "2"]


def test_a_short_question_is_found_as_a_whole_text_alone() -> None:
    texts = asked("What is the meaning of life?")
    assert found(texts, "what is the meaning of LIFE").found[0].short
    inside = found(texts, "He asked: what is the meaning of life?")
    assert not inside.found and "is word for word in the 1 training rows" in inside.summary("own")
    assert not found(asked("\U0001f600 ..."), "", "?!").found  # no words, nothing to find


def test_a_few_short_questions_of_many_are_a_warning_and_any_long_one_an_error() -> None:
    many = asked("Why is the sky blue?", LONG, *(f"What is {n}?" for n in range(300)))
    few = found(many, "Why is the sky blue?", "Why is the sky blue?", "What is 7?")
    assert few.found and not few.is_error and few.leaked_questions == 2
    assert found(many, LONG).is_error
    assert found(many, *(f"What is {n}?" for n in range(4))).is_error
    assert found(many[:20], "Why is the sky blue?").is_error  # one in twenty


def test_every_leaked_answer_is_named_and_very_short_ones_are_no_sign() -> None:
    gold = [f"{number} of them: {LONG[:-1]}, said {number}" for number in range(120)]
    texts = [EvalText(str(number), "answer", text) for number, text in enumerate(gold)]
    leaks = found([*texts, EvalText("x", "answer", "Paris.")], "Paris.", *gold[:110])
    assert leaks.leaked_rows == leaks.leaked_questions == 110
    assert leaks.lines(3)[3] == "... and 107 more rows"
    assert leaks.lines(1)[0].startswith("rows.jsonl:2: answer to question 0 (100% of its 13-grams)")

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}]
    row = DataRow("rows.jsonl", 1, {"messages": turns}, id="a")
    assert find_leaks([row], {"eval": asked(LONG)})["eval"].is_error


def test_leaks_are_named_in_the_order_of_the_rows_and_their_texts() -> None:
    gold = [f"{number} of them: {LONG[:-1]}, said {number}" for number in range(120)]
    leaks = found(asked(*gold), " ".join(gold[60:]), " ".join(gold[:60]))
    numbers = [*range(61, 121), *range(1, 41)]  # the first 100
    assert [leak.question for leak in leaks.found] == [str(number) for number in numbers]


def test_a_long_question_behind_a_hundred_short_ones_is_an_error() -> None:
    many = asked("Why is the sky blue?", LONG, *(f"What is {n}?" for n in range(300)))
    leaks = found(many, *["Why is the sky blue?"] * 101, LONG)
    assert leaks.is_error and leaks.leaked_questions == 2
    assert leaks.lines(1)[0].startswith("rows.jsonl:102: question 2")
