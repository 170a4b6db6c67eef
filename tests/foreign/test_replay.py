"""Replaying foreign judgments: published numbers to the digit, and the findings behind them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import jsonschema
import pytest

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError
from recipes_lib.foreign.files import CSV_COLUMNS
from recipes_lib.foreign.replay import replay_files, rounded

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("RECIPES_SHARED_DATA") or ROOT.parent / "shared" / "data")
STUDY = DATA / "original_study"
SCHEMA = json.loads((ROOT / "schema" / "judge_replay.schema.json").read_text())
needs_data = pytest.mark.skipif(
    not STUDY.is_dir(), reason="real data not present (RECIPES_SHARED_DATA)"
)


def replay(path: Path) -> dict:
    return replay_files([path])


def _names(report: dict) -> set[str]:
    return {finding["name"] for finding in report["findings"]}


def _finding(report: dict, name: str) -> dict:
    return next(finding for finding in report["findings"] if finding["name"] == name)


@needs_data
@pytest.mark.parametrize(
    ("arm", "win", "loss", "tie", "mean", "unparsed"),
    [
        ("baseline", "79.00", "14.75", "6.25", "4.09", 27),
        ("finetuned", "85.00", "9.88", "5.13", "4.21", 9),
    ],
)
def test_original_alpaca_eval_is_reproduced_and_its_flaws_are_named(
    arm: str, win: str, loss: str, tie: str, mean: str, unparsed: int
) -> None:
    report = replay(STUDY / "alpaca_eval_rank_8" / arm / "detailed_results.csv")
    recorded = report["recorded"]
    assert [rounded(recorded[name], 2) for name in ("win", "loss", "tie", "mean_score")] == [
        win,
        loss,
        tie,
        mean,
    ]
    summary = json.loads((STUDY / "alpaca_eval_rank_8" / arm / "summary.json").read_text())
    assert (recorded["win"], recorded["mean_score"], recorded["n"]) == (
        summary["win_rate_vs_baseline"],
        summary["average_score"],
        800,
    )
    assert 0.55 <= report["contradictions"]["rate"] <= 0.72
    assert report["contradictions"]["for_first"] >= 0.99 * report["contradictions"]["count"]
    assert {"one-order-judging", "contradictions", "unparsed-as-tie"} <= _names(report)
    assert report["unparsed"]["count"] == _finding(report, "unparsed-as-tie")["count"] == unparsed
    assert ("empty-answer-wins" in _names(report)) == (arm == "baseline")
    assert report["order"]["judged"] == "one-order"
    assert report["bounds"]["all_won"] == recorded["win"] + 100 * unparsed / 800
    jsonschema.validate(report, SCHEMA)


@needs_data
@pytest.mark.parametrize(
    ("stem", "numbers", "missing"),
    [
        ("HF-Base", ["5.550", "5.055", "6.045"], "question 131 turn 1"),
        ("Dolly-QLoRA-Finetuned", ["6.037", "5.618", "6.457"], "question 86 turn 2"),
    ],
)
def test_original_mt_bench_is_reproduced_and_its_flaws_are_named(
    stem: str, numbers: list[str], missing: str
) -> None:
    (path,) = (STUDY / "mt_bench").glob(f"*{stem}_raw.jsonl")
    report = replay(path)
    recorded = report["recorded"]
    assert [
        rounded(value, 3) for value in (recorded["mean_score"], *recorded["mean_score_interval"])
    ] == numbers
    assert _finding(report, "missing-turn")["items"] == [missing]
    assert _finding(report, "turn-without-context")["count"] == 79
    assert report["bounds"]["all_lost"] < report["bounds"]["all_won"]
    jsonschema.validate(report, SCHEMA)


@needs_data
def test_alpaca_eval_annotations_give_the_librarys_win_rate() -> None:
    report = replay(
        DATA / "alpaca_eval" / "llama-2-7b-chat-hf" / "alpaca_eval_gpt4.annotations.json"
    )
    with (DATA / "alpaca_eval" / "alpaca_eval_gpt4_leaderboard.csv").open() as file:
        golden = next(row for row in csv.DictReader(file) if row[""] == "llama-2-7b-chat-hf")
    assert report["alpaca_eval"]["win_rate"] == float(golden["win_rate"])
    assert report["alpaca_eval"]["standard_error"] == pytest.approx(
        float(golden["standard_error"]), rel=1e-12
    )
    assert report["alpaca_eval"]["n"] == 805
    assert _names(report) == {"one-order-judging"}
    jsonschema.validate(report, SCHEMA)


@needs_data
def test_the_same_file_under_two_names_is_found(tmp_path: Path) -> None:
    (path,) = (STUDY / "mt_bench").glob("*Finetuned_raw.jsonl")
    copy = tmp_path / "rank_32.jsonl"
    copy.write_bytes(path.read_bytes())
    report = replay_files([path, copy])
    assert [finding["name"] for finding in report["findings"]] == ["identical-files"]
    assert "cannot be ranked" in report["findings"][0]["message"]
    jsonschema.validate(report, SCHEMA)


def _csv(path: Path, rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(rows)
    return path


def _jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_same_answers_with_other_verdicts_are_found_across_files(tmp_path: Path) -> None:
    first = _csv(tmp_path / "a.csv", [("q", "mine", "theirs", 5, "A", "[Overall] 5")])
    second = _csv(tmp_path / "b.csv", [("q", "mine", "theirs", 1, "B", "[Overall] 1")])
    assert [finding["name"] for finding in replay_files([first, second])["findings"]] == [
        "same-answers"
    ]


def test_a_file_of_which_a_row_was_dropped_is_found_beside_the_whole_one(tmp_path: Path) -> None:
    rows = [(f"q{i}", f"mine {i}", f"theirs {i}", 5, "A", "[Overall] 5") for i in range(9)]
    whole, copy = _csv(tmp_path / "a.csv", rows), _csv(tmp_path / "b.csv", rows[:4] + rows[5:])
    assert [one["name"] for one in replay_files([whole, copy])["findings"]] == ["same-answers"]
    other = [(*row[:1], f"another {n}", *row[2:]) for n, row in enumerate(rows)]
    mixed = _csv(tmp_path / "c.csv", rows[:4] + other[4:])
    assert not replay_files([whole, mixed])["findings"]


def test_constant_answers_and_repeated_questions_are_found(tmp_path: Path) -> None:
    rows = [(f"q{i}", "I win.", f"other {i}", 5, "A", "[Overall] 5") for i in range(10)]
    report = replay(_csv(tmp_path / "a.csv", [*rows, rows[0]]))
    assert {"constant-answer", "repeated-judgments"} <= _names(report)


def _single(
    question: int, turn: int, score: float, model: str = "m", prompt: str | None = None
) -> dict:
    prompt = prompt or f"[Question]\nFirst question {question}" + (
        f"\n### User:\nSecond {question}" if turn == 2 else ""
    )
    judge = ["gpt-4", "single-v1" if turn == 1 else "single-v1-multi-turn"]
    return {
        "question_id": question,
        "model": model,
        "judge": judge,
        "user_prompt": prompt,
        "judgment": f"[[{score}]]",
        "score": score,
        "turn": turn,
    }


def test_fastchat_single_reports_means_per_model_and_turn_and_unrated_rows(tmp_path: Path) -> None:
    rows = [
        _single(81, 1, 8),
        _single(81, 2, 6),
        _single(82, 1, -1),
        _single(82, 2, 4),
        _single(81, 1, 9, "n"),
        _single(81, 2, 9, "n"),
    ]
    report = replay(_jsonl(tmp_path / "gpt-4_single.jsonl", rows))
    assert report["groups"]["m"]["mean_score"] == 6.0 and report["groups"]["m"]["turns"] == {
        "1": 8.0,
        "2": 5.0,
    }
    assert report["unparsed"]["count"] == 1 and _names(report) == {"unparsed-left-out"}
    jsonschema.validate(report, SCHEMA)


def test_fastchat_second_turn_without_its_first_is_found(tmp_path: Path) -> None:
    rows = [_single(81, 1, 8), _single(81, 2, 6, prompt="[Question]\nSecond question alone")]
    assert _names(replay(_jsonl(tmp_path / "s.jsonl", rows))) == {"turn-without-context"}


def _prompts() -> dict[str, str]:
    """FastChat's prompt templates by name."""
    lines = (DATA / "mt_bench" / "judge_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row["prompt_template"] for row in map(json.loads, lines)}


class _Empty(dict):
    def __missing__(self, key: str) -> str:
        return "an answer"


@needs_data
@pytest.mark.parametrize(
    ("first", "second"),
    [("single-v1", "single-v1-multi-turn"), ("single-math-v1", "single-math-v1-multi-turn")],
)
def test_a_short_question_in_fastchats_own_prompts_is_found_in_the_second_turn(
    tmp_path: Path, first: str, second: str
) -> None:
    asked = _Empty(question="Why?", question_1="Why?", question_2="And then?")
    rows = [
        _single(81, 1, 8, prompt=_prompts()[first].format_map(asked)),
        _single(81, 2, 6, prompt=_prompts()[second].format_map(asked)),
    ]
    assert _names(replay(_jsonl(tmp_path / "gpt-4_single.jsonl", rows))) == set()
    rows[1]["user_prompt"] = _prompts()[second].format_map(
        _Empty(question_1="[gone]", question_2="And then?")
    )
    assert _names(replay(_jsonl(tmp_path / "gpt-4_single.jsonl", rows))) == {"turn-without-context"}


@needs_data
def test_a_short_question_is_found_in_the_second_turn_of_a_pair(tmp_path: Path) -> None:
    asked = _Empty(question="Why?", question_1="Why?", question_2="And then?")
    row = {
        "question_id": 81,
        "model_1": "m",
        "model_2": "base",
        "g1_winner": "tie",
        "g2_winner": "tie",
    }
    names = {1: "pair-v2", 2: "pair-v2-multi-turn"}
    rows = [
        row | {"turn": turn, "g1_user_prompt": _prompts()[name].format_map(asked)}
        for turn, name in names.items()
    ]
    assert "turn-without-context" not in _names(replay(_jsonl(tmp_path / "gpt-4_pair.jsonl", rows)))


def test_the_mean_of_grades_lies_inside_its_bounds_where_rows_repeat(tmp_path: Path) -> None:
    rows = [
        _single(81, 1, 2),
        _single(81, 1, 2),
        _single(81, 1, 2),
        _single(81, 2, 10),
        _single(82, 1, 8),
        _single(82, 2, 8),
    ]
    report = replay(_jsonl(tmp_path / "whole.jsonl", rows))
    assert report["recorded"]["mean_score"] == pytest.approx(32 / 6)
    assert (report["bounds"]["all_lost"], report["bounds"]["all_won"]) == (
        pytest.approx(32 / 6),
        pytest.approx(32 / 6),
    )
    report = replay(
        _jsonl(tmp_path / "torn.jsonl", [*rows[:5], _single(83, 1, -1)])
    )  # two turns that are not there, one without a rating
    assert report["bounds"]["all_lost"] == pytest.approx((24 + 3 * 1) / 8) and report["bounds"][
        "all_won"
    ] == pytest.approx((24 + 30) / 8)
    assert (
        report["bounds"]["all_lost"]
        < report["recorded"]["mean_score"]
        < report["bounds"]["all_won"]
    )


@needs_data
@pytest.mark.parametrize("repeated", [0, 40])
def test_the_original_mean_lies_inside_its_bounds(tmp_path: Path, repeated: int) -> None:
    for path in (STUDY / "mt_bench").glob("*_raw.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        copy = tmp_path / path.name
        copy.write_text("".join([*lines, *lines[:repeated]]), encoding="utf-8")
        report = replay(copy)
        assert (
            report["bounds"]["all_lost"]
            <= report["recorded"]["mean_score"]
            <= report["bounds"]["all_won"]
        )


def test_fastchat_pair_counts_flips_as_ties_and_errors_as_unparsed(tmp_path: Path) -> None:
    def game(question: int, first: str, second: str) -> dict:
        row = {
            "question_id": question,
            "model_1": "m",
            "model_2": "base",
            "g1_winner": first,
            "g2_winner": second,
            "turn": 1,
        }
        return row | {
            "g1_judgment": "Assistant A is better than Assistant B. [[A]]",
            "g2_judgment": "x",
            "judge": ["gpt-4", "pair-v2"],
        }

    rows = [
        game(81, "model_1", "model_1"),
        game(82, "model_1", "model_2"),
        game(83, "tie", "tie"),
        game(84, "model_2", "model_2"),
        game(85, "error", "tie"),
    ]
    report = replay(_jsonl(tmp_path / "gpt-4_pair.jsonl", rows))
    assert [report["recorded"][name] for name in ("win", "loss", "tie", "n")] == [
        25.0,
        25.0,
        50.0,
        4,
    ]
    assert (report["order"]["judged"], report["order"]["flips"]) == ("both", 1)
    assert (report["bounds"]["all_lost"], report["bounds"]["all_won"]) == (20.0, 40.0)
    assert report["contradictions"]["decidable"] == 3 and report["contradictions"]["count"] == 1
    jsonschema.validate(report, SCHEMA)


def test_annotations_in_both_orders_report_flips(tmp_path: Path) -> None:
    def row(question: str, first: str, second: str, preference: float | None) -> dict:
        return {
            "instruction": question,
            "output_1": first,
            "output_2": second,
            "generator_1": "r",
            "generator_2": "m",
            "preference": preference,
        }

    rows = [
        row("q", "a", "b", 2),
        row("q", "b", "a", 1),
        row("p", "a", "b", 2),
        row("p", "b", "a", 2),
        row("z", "same", "same", 1.5),
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    report = replay(path)
    assert report["order"]["judged"] == "both" and report["order"]["flips"] == 1
    path.write_text(json.dumps([*rows[:1], row("n", "a", "b", None)]))
    report = replay(path)
    assert (
        report["order"]["judged"] == "one-order"
        and report["unparsed"]["count"] == 1
        and report["alpaca_eval"]["n"] == 1
    )


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.csv", b"instruction,feedback\nx,y\n", 1, "no column"),
        ("a.csv", ",".join(CSV_COLUMNS).encode() + b"\nq,a,b,5,Maybe,text\n", 2, "row 1"),
        ("a.csv", ",".join(CSV_COLUMNS).encode() + b"\n", None, "0 judgments"),
        ("a.jsonl", b'{"raw": "x", "turn": 1, "question_id": 81}\n{"raw": \n', 2, "not JSON"),
        (
            "a.jsonl",
            b'{"raw": "x", "turn": 1, "question_id": 81}\n{"raw": "y"}\n',
            2,
            "question_id",
        ),
        ("a.jsonl", b"3\n", 1, "object"),
        ("a.jsonl", b"", None, "0 judgments"),
        ("a.json", b'[{"a": 1}]', None, "known format"),
        (
            "a.json",
            b'{\n "results": {"arc": {}}\n}\n',
            None,
            "known format of judgments: these are results of lm_eval",
        ),
        (
            "a.json",
            b'[{"instruction": "q", "output": "a", "generator": "m"}]',
            None,
            "known format of judgments: these are answers",
        ),
        (
            "a.json",
            b'[{"input": "q", "label": 1, "output_1": "a", "output_2": "b"}]',
            None,
            "these are pairs that people labelled",
        ),
        ("a.json", b'{"a": 1}\n\xff', 2, "UTF-8"),
        ("a.json", b"[1,", 1, "not JSON"),
        (
            "a.jsonl",
            (
                b'{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "me",'
                b' "g2_winner": "tie"}\n'
            ),
            1,
            "winners",
        ),
        (
            "a.json",
            b'[{"instruction": "q", "output_1": "", "output_2": "", "preference": 7}]',
            None,
            "preference 7",
        ),
    ],
)
def test_bad_files_are_named_with_their_line(
    tmp_path: Path, name: str, content: bytes, line: int | None, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        replay(path)
    assert caught.value.line == line and words in caught.value.what


def test_replay_prints_numbers_and_findings_and_names_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _csv(
        tmp_path / "a.csv",
        [("q", "", "theirs", 5, "A", "[Overall] 5"), ("p", "x", "y", 3, "Tie", "\x1b[31mnothing")],
    )
    assert main(["judge", "replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert "win 50.00%" in out and "! empty-answer-wins" in out and "! unparsed-as-tie" in out
    assert out.splitlines()[-1].startswith("next: ") and "\x1b" not in out
    assert main(["judge", "replay", str(path), "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)


def test_a_missing_file_is_one_line_and_exit_code_four(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "replay", "no-such.csv"]) == 4
    assert capsys.readouterr().err.startswith("no-such.csv: cannot be read")
