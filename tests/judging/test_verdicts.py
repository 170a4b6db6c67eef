"""Verdict parsing: the golden strings with both parsers' answers, and properties that hold for any
text.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.judging.verdicts import Status, parse_absolute, parse_relative

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


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['mode']}-{row['text']!r:.50}")
def test_golden_verdict(row: dict) -> None:
    verdict = PARSERS[row["mode"]](row["text"], row.get("finish_reason"))
    assert (verdict.value, verdict.status.value) == (row["ours"], row["status"])


def test_we_only_accept_more_than_the_official_parser_by_one_full_stop() -> None:
    for row in GOLDEN:
        if row["ours"] is not None and row["official"] is None:
            assert row["text"].rstrip().endswith("."), row


def test_where_both_parsers_read_a_verdict_it_is_the_same() -> None:
    assert all(
        row["ours"] == row["official"]
        for row in GOLDEN
        if row["ours"] is not None and row["official"] is not None
    )


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200), st.sampled_from(["absolute", "relative"]))
def test_any_text_gets_a_status_and_only_ok_has_a_value(text: str, mode: str) -> None:
    verdict = PARSERS[mode](text)
    assert (verdict.status is Status.OK) == (verdict.value is not None)
    assert (verdict.status is Status.EMPTY) == (not text.strip())


@settings(max_examples=150, deadline=None)
@given(FEEDBACK, st.sampled_from("AB"), st.sampled_from(["", " ", "\n", "."]))
def test_feedback_without_brackets_never_changes_the_verdict(
    feedback: str, letter: str, tail: str
) -> None:
    verdict = parse_relative(f"{feedback} [RESULT] {letter}{tail}")
    assert verdict.value == letter or "conflict" in (verdict.reason or "")


@settings(max_examples=150, deadline=None)
@given(FEEDBACK, st.sampled_from("AB"), st.sampled_from("AB"))
def test_two_different_verdicts_are_never_one(feedback: str, first: str, last: str) -> None:
    verdict = parse_relative(f"[RESULT] {first}\n{feedback}\n[RESULT] {last}")
    if first != last:
        assert verdict.status is not Status.OK


@settings(max_examples=150, deadline=None)
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
