"""Verdict parsing: golden strings with the official parser's answer beside ours, and properties
that hold for any text.
"""

import json
import re
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes_lib.evals.prompts import CHOICES, GRADES, parse_verdict

GOLDEN = Path(__file__).with_name("verdicts.golden.jsonl").read_text("utf-8").splitlines()
FEEDBACK = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]"), max_size=80)


def test_golden_verdicts_and_what_is_taken_beyond_the_official_parser() -> None:
    rows = list(map(json.loads, GOLDEN))
    assert len(rows) == 136
    wrong = []
    for row in rows:
        allowed = GRADES if row["mode"] == "absolute" else CHOICES
        as_json = row.get("json", False)
        verdict = parse_verdict(
            row["text"] or "", allowed, row.get("finish_reason", "stop"), as_json
        )
        if (verdict["value"], verdict["status"]) != (row["ours"], row["status"]):
            wrong.append((row, verdict))
        if row["ours"] is None or as_json:
            continue
        if row["official"] is None:  # a full stop, a colon, Markdown
            assert row["text"].rstrip().endswith(".") or re.search(r"[*`_:]|\[\[", row["text"]), row
        else:
            assert row["ours"] == row["official"]
    assert not wrong


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.sampled_from([GRADES, CHOICES]))
def test_any_text_gets_a_status_and_only_ok_has_a_value(text: str, allowed: tuple) -> None:
    verdict = parse_verdict(text, allowed)
    assert (verdict["status"] == "ok") == (verdict["value"] is not None)
    assert (verdict["status"] == "empty") == (not text.strip())
    assert parse_verdict(text, allowed, "length")["status"] == "truncated"


@settings(max_examples=60, deadline=None)
@given(FEEDBACK, *[st.sampled_from("AB")] * 2, st.sampled_from(["", "\n", "."]))
def test_two_different_verdicts_are_never_one(text: str, first: str, last: str, tail: str) -> None:
    verdict = parse_verdict(f"{text} [RESULT] {last}{tail}", CHOICES)
    assert verdict["value"] == last or "conflict" in verdict["reason"]
    both = parse_verdict(f"[RESULT] {first}\n{text}\n[RESULT] {last}", CHOICES)
    assert first == last or both["status"] != "ok"
    after = parse_verdict(f"Fine. [RESULT] {last} {text} indeed", CHOICES)
    assert after["value"] is None  # words after a verdict undo it


def test_a_text_that_repeats_itself_is_read_in_linear_time() -> None:
    started = time.process_time()
    for piece in ("[RESULT] ", "score ( ", "# #", "[", "[result", " ", "\n", "score of ", "((1"):
        text = piece * (200_000 // len(piece))
        for options in ((GRADES,), (CHOICES,), (CHOICES, "stop", True)):
            assert parse_verdict(text, *options)["status"] != "ok"
    assert time.process_time() - started < 5  # 200,000 # took minutes
