"""Verdict parsing: the golden strings with both parsers' answers, and properties that hold for any
text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.evals.verdicts import Status, parse_absolute, parse_json, parse_relative

GOLDEN = [
    json.loads(line)
    for line in Path(__file__)
    .with_name("verdicts.golden.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
PARSERS = {"absolute": parse_absolute, "relative": parse_relative}
FEEDBACK = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]"), max_size=80)


def test_golden_file_holds_at_least_sixty_different_strings() -> None:
    assert (
        len({(row["mode"], row["text"], row.get("finish_reason")) for row in GOLDEN})
        == len(GOLDEN)
        >= 60
    )


def test_golden_verdicts() -> None:
    wrong = []
    for row in GOLDEN:
        found = PARSERS[row["mode"]](row["text"], row.get("finish_reason"))
        if (found.value, found.status.value) != (row["ours"], row["status"]):
            wrong.append((row, found))
    assert not wrong


def test_more_than_the_official_parser_takes_is_a_full_stop_a_colon_or_markdown() -> None:
    for row in GOLDEN:
        if row["ours"] is not None and row["official"] is None:
            assert row["text"].rstrip().endswith(".") or re.search(r"[*`_:]|\[\[", row["text"]), row
        if row["ours"] is not None and row["official"] is not None:
            assert row["ours"] == row["official"]


def test_json_verdicts() -> None:
    cases = {
        '{"feedback": "fuller", "result": "A"}': "A",
        '```json\n{"result": "b"}\n```': "B",
        '{"result": "C"}': None,
        '{"result": 4}': None,
        "[RESULT] A": None,
        "": None,
        "[" * 100_000: None,
    }
    for text, value in cases.items():
        assert parse_json(text, ("A", "B"), "stop").value == value, text[:40]
    assert parse_json('{"result": 4}', ("1", "2", "3", "4", "5"), "stop").value == 4
    assert parse_json('{"result": "A"}', ("A", "B"), "length").status is Status.TRUNCATED


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.sampled_from(["absolute", "relative"]))
def test_any_text_gets_a_status_and_only_ok_has_a_value(text: str, mode: str) -> None:
    verdict = PARSERS[mode](text)
    assert (verdict.status is Status.OK) == (verdict.value is not None)
    assert (verdict.status is Status.EMPTY) == (not text.strip())


@settings(max_examples=40, deadline=None)
@given(FEEDBACK, st.sampled_from("AB"), st.sampled_from(["", " ", "\n", "."]))
def test_feedback_without_brackets_never_changes_the_verdict(
    feedback: str, letter: str, tail: str
) -> None:
    verdict = parse_relative(f"{feedback} [RESULT] {letter}{tail}")
    assert verdict.value == letter or "conflict" in (verdict.reason or "")


@settings(max_examples=40, deadline=None)
@given(FEEDBACK, st.sampled_from("AB"), st.sampled_from("AB"))
def test_two_different_verdicts_are_never_one(feedback: str, first: str, last: str) -> None:
    verdict = parse_relative(f"[RESULT] {first}\n{feedback}\n[RESULT] {last}")
    if first != last:
        assert verdict.status is not Status.OK


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.text(st.characters(categories=["L"]), min_size=1, max_size=20))
def test_words_after_the_verdict_undo_it(score: int, words: str) -> None:
    assert parse_absolute(f"Fine. [RESULT] {score} {words}").value is None


@pytest.mark.parametrize("parse", PARSERS.values())
def test_a_text_cut_at_the_token_limit_has_no_verdict(parse) -> None:
    assert parse("Fine. [RESULT] 4", "length").status is Status.TRUNCATED
    assert parse("", "length").status is Status.TRUNCATED


@pytest.mark.parametrize("parse", PARSERS.values())
def test_a_long_hostile_text_is_parsed_in_no_time(parse) -> None:
    assert parse("[RESULT] " * 20_000).status is Status.UNPARSED
    assert parse("score " + "( " * 50_000).status is Status.UNPARSED
