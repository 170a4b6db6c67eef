"""Files that once led to a sentence that was false: each is read as `recipes compare` reads it, and
says the truth or nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes_lib.compare.claims import Comparison, compare_arms
from recipes_lib.compare.measurements import (
    ArmMeasurements,
    Measurements,
    RunMeasurements,
    read_measurements,
)
from recipes_lib.compare.validity import check_validity
from recipes_lib.core.errors import DataError
from recipes_lib.eval_log import EvalLog, Measure, Sample

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import synthetic_runs


def compared(**arms: list[Path]) -> Comparison:
    measurements = read_measurements(arms)
    return compare_arms(measurements, check_validity(None, measurements))


def codes(comparison: Comparison) -> set[str]:
    return {finding.code for finding in comparison.findings if finding.severity == "error"}


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    how(value)
    file.write_text(json.dumps(value))


def change_lines(file: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [how(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two trained runs, judged against the reference: the second one wins far more."""
    folders = [
        synthetic_runs.write_run(tmp_path, name, rank=rank)
        for name, rank in (("one", 8), ("two", 32))
    ]
    for folder, skill in zip(folders, (0.4, 0.8), strict=True):
        synthetic_runs.write_alpaca_eval(folder, 100, skill=skill)
        synthetic_runs.write_mt_bench(folder, 40, skill=5 * skill)
    return folders


def lm_eval(folder: Path, values: list[float], metric: str = "acc", higher: bool = True) -> Path:
    """Write one task with these samples; return its result."""
    place = folder / "evals" / "lm_eval"
    samples = [
        {"doc_id": n, "doc": {}, "filter": "none", "doc_hash": f"h{n}", metric: value}
        for n, value in enumerate(values)
    ]
    synthetic_runs.write_lines(place / "samples" / "samples_t.jsonl", samples)
    row = {
        "task": "t",
        "metric": metric,
        "filter": "none",
        "value": sum(values) / len(values),
        "stderr": None,
        "low": None,
        "high": None,
        "n": len(values),
        "num_fewshot": 0,
        "version": 1,
        "higher_is_better": higher,
    }
    facts = {
        "suite": "lm_eval",
        "target": folder.name,
        "against": None,
        "answers": {},
        "tasks": [row],
    }
    synthetic_runs.write_json(place / "result.json", facts)
    return place / "result.json"


def test_an_arm_named_reference_is_not_what_others_were_judged_against(tmp_path: Path) -> None:
    folders = [synthetic_runs.write_run(tmp_path, name) for name in ("reference", "other")]
    for folder, skill in zip(folders, (0.4, 0.8), strict=True):
        synthetic_runs.write_alpaca_eval(folder, 100, skill=skill)
    (row,) = compared(reference=[folders[0]], other=[folders[1]]).rows
    assert not row.head_to_head and row.opponent == "the reference answers"


def test_a_run_that_is_called_like_an_arm_is_not_that_arm(tmp_path: Path) -> None:
    mine, other = (synthetic_runs.write_run(tmp_path, f"study--{name}") for name in ("r8", "r32"))
    synthetic_runs.write_alpaca_eval(other, 100, against="r8", skill=0.8)
    synthetic_runs.write_alpaca_eval(mine, 100, skill=0.4)
    comparison = compared(r8=[mine], r32=[other])
    assert not comparison.rows and "another run, r8" in {
        score.opponent for score in comparison.scores
    }


@pytest.mark.parametrize(
    ("suite", "key", "metric"),
    [
        ("alpaca_eval", "instruction", "alpaca_eval/win_rate"),
        ("alpaca_eval", "opponent_answer", "alpaca_eval/win_rate"),
        ("mt_bench", "instruction", "mt_bench/grade"),
    ],
)
def test_other_questions_or_reference_answers_under_the_same_ids_stop_the_sentence(
    suite: str, key: str, metric: str, two: list[Path]
) -> None:
    def other(row: dict[str, Any]) -> dict[str, Any]:
        return row | {key: f"other {row[key]}"}

    change_lines(two[1] / "evals" / suite / "items.jsonl", other)
    comparison = compared(one=[two[0]], two=[two[1]])
    (row,) = (row for row in comparison.rows if row.metric == metric)
    assert row.sentence.startswith("No claim") and "protocol-differs" in codes(comparison)
    (untouched,) = (row for row in comparison.rows if row.metric != metric)
    assert not untouched.sentence.startswith("No claim")


def test_verdicts_against_a_run_that_was_trained_again_are_about_no_run_that_is_there(
    two: list[Path],
) -> None:
    for folder in two:
        facts = {"answers": {"name": folder.name, "fingerprint": f"weights of {folder.name}"}}
        change(
            folder / "evals/alpaca_eval/result.json",
            lambda result, facts=facts: result.update(facts),
        )
    synthetic_runs.write_alpaca_eval(two[1], 100, against="one", skill=0.8)
    against = two[1] / "evals/alpaca_eval/result.against-one.json"
    for weights, stopped in (("weights of one", False), ("other weights", True)):
        facts = {
            "answers": {"fingerprint": "weights of two"},
            "opponent": {"name": "one", "fingerprint": weights},
        }
        change(against, lambda result, facts=facts: result.update(facts))
        comparison = compared(one=[two[0]], two=[two[1]])
        (row,) = (row for row in comparison.rows if row.head_to_head)
        assert (
            row.sentence.startswith("No claim")
            == stopped
            == ("answers-of-another-arm" in codes(comparison))
        )


@pytest.mark.parametrize(
    "judge", [None, {"name": "other", "model": "other/judge", "fingerprint": None}]
)
def test_a_judge_that_is_not_recorded_is_not_taken_for_the_known_one(
    judge: dict[str, Any] | None, two: list[Path]
) -> None:
    change(two[1] / "evals/alpaca_eval/result.json", lambda result: result.update(judge=judge))
    assert "judges-differ" in codes(compared(one=[two[0]], two=[two[1]]))


def test_every_seed_of_an_arm_was_asked_in_the_same_way(tmp_path: Path, two: list[Path]) -> None:
    again = [
        synthetic_runs.write_run(tmp_path, f"{name}-43", seed=43, rank=rank)
        for name, rank in (("one", 8), ("two", 32))
    ]
    for folder in again:
        synthetic_runs.write_alpaca_eval(folder, 100)
        change(
            folder / "evals/alpaca_eval/result.json",
            lambda result: result["recipe"].update(generation={"max_new_tokens": 512}),
        )
    change(
        again[1] / "evals/alpaca_eval/result.json",
        lambda result: result["recipe"].update(generation={"max_new_tokens": 8}),
    )
    assert "protocol-differs" in codes(compared(one=[two[0], again[0]], two=[two[1], again[1]]))


@pytest.mark.parametrize("first", [0, 1])
def test_errors_of_0_and_1_are_no_percentages_beside_larger_ones(
    first: int, two: list[Path]
) -> None:
    lm_eval(two[0], [0.0, 0.0, 1.0] * 30, "mae", higher=False)
    lm_eval(two[1], [0.0, 1.0, 3.5] * 30, "mae", higher=False)
    comparison = compared(**{folder.name: [folder] for folder in (two[first], two[1 - first])})
    (row,) = (row for row in comparison.rows if row.metric == "lm_eval/t/mae")
    assert row.unit == "number" and "%" not in row.sentence and "points" not in row.sentence
    assert "0.333" in row.sentence and "1.50" in row.sentence
    assert row.verdict == ("better" if row.first == "one" else "worse")


def test_a_total_below_one_is_a_share_only_where_its_name_says_so(two: list[Path]) -> None:
    for folder, metric in zip(two, ("bits_per_byte", "acc_norm"), strict=True):
        change(
            lm_eval(folder, [0.5] * 20, metric), lambda result: result["tasks"][0].update(value=0.8)
        )
    units = {
        score.label: score.unit
        for score in compared(one=[two[0]], two=[two[1]]).scores
        if score.label.startswith("t ")
    }
    assert units == {"t bits_per_byte": "number", "t acc_norm": "share"}


@pytest.mark.parametrize("twice", ["the same rows", "other values"])
def test_samples_that_stand_twice_are_refused(twice: str, two: list[Path]) -> None:
    result = lm_eval(two[0], [1.0, 0.0] * 50)
    samples = result.parent / "samples" / "samples_t.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    again = rows if twice == "the same rows" else [row | {"acc": 1 - row["acc"]} for row in rows]
    synthetic_runs.write_lines(samples, [*rows, *again])
    with pytest.raises(DataError, match="200 samples of 100 items"):
        compared(one=[two[0]], two=[two[1]])


def test_a_result_over_more_items_than_there_are_samples_is_refused(two: list[Path]) -> None:
    change(lm_eval(two[0], [1.0, 0.0] * 50), lambda result: result["tasks"][0].update(n=1000))
    with pytest.raises(DataError, match="its n is 1000, and there are 100 samples"):
        compared(one=[two[0]], two=[two[1]])


def test_pairs_without_a_row_are_not_left_out_in_silence(two: list[Path]) -> None:
    folder = two[1] / "evals" / "alpaca_eval"
    samples = folder / "items.jsonl"
    lines = samples.read_text().splitlines()
    lost = [line for line in lines if json.loads(line)["outcome"] == "tie"]
    samples.write_text("\n".join(line for line in lines if line not in lost) + "\n")
    change(
        folder / "result.json", lambda result: result["pairs"].update(tie=0, unresolved=len(lost))
    )
    with pytest.raises(DataError, match="its counts differ from the stored judgments"):
        compared(one=[two[0]], two=[two[1]])


@pytest.mark.parametrize("stem", ["alpaca_eval", "mt_bench"])
def test_a_copy_of_which_rows_were_dropped_is_still_a_copy(stem: str, tmp_path: Path) -> None:
    one, other = (synthetic_runs.write_run(tmp_path, name) for name in ("one", "two"))
    write = {"alpaca_eval": synthetic_runs.write_alpaca_eval, "mt_bench": _write_mt_bench}[stem]
    write(one, 40)
    shutil.copytree(one / "evals", other / "evals")
    dropped = other / "evals" / stem / "items.jsonl"
    rows = [json.loads(line) for line in dropped.read_text().splitlines()]
    synthetic_runs.write_lines(dropped, [row for row in rows if not _of(row, ("q00007", "87"))])
    change(other / f"evals/{stem}/result.json", lambda told: _count_again(told, dropped))
    comparison = compared(one=[one], two=[other])
    assert {code for code in codes(comparison) if code.startswith("identical")}
    assert {row.verdict for row in comparison.rows} == {"cannot be tested"}


def _write_mt_bench(folder: Path, n: int) -> None:
    synthetic_runs.write_mt_bench(folder, n)


def _of(row: dict[str, Any], questions: tuple[str, ...]) -> bool:
    return row["question_id"].partition(":")[0] in questions


def _count_again(told: dict[str, Any], rows: Path) -> None:
    """Make a result agree with the rows that are left."""
    left = [json.loads(line) for line in rows.read_text().splitlines()]
    if told["suite"] == "mt_bench":
        values = [row["value"] for row in left if row["value"] is not None]
        mean = sum(values) / len(values)
        told["measures"][0] |= {"reported_n": len(values), "reported": mean}
    else:
        for outcome in ("win", "loss", "tie", "unresolved"):
            told["pairs"][outcome] = sum(row["outcome"] == outcome for row in left)


def test_a_question_that_is_asked_again_under_another_id_is_no_new_evidence() -> None:
    rng, claims = np.random.default_rng(5), {True: 0, False: 0}
    for _ in range(150):
        first, second = (np.repeat((rng.random(40) < 0.5).astype(float), 3) for _ in range(2))
        for known in claims:
            measurements = _answered(first, second, known)
            (row,) = compare_arms(measurements, check_validity(None, measurements)).rows
            claims[known] += row.verdict in ("better", "worse")
            assert row.tested and row.tested.questions == (40 if known else 120)
    assert claims[True] <= 12 < claims[False]  # 5% with two standard errors; without, 22% are false
    findings = check_validity(None, _answered(first, second, known=True))
    (finding,) = (one for one in findings if one.code == "repeated-questions")
    assert "40 of 120 are different" in finding.title


def _answered(first: Any, second: Any, known: bool) -> Measurements:
    """Two arms that answered 40 questions three times each, under ids of their own."""
    arms = {}
    for name, values in (("a", first), ("b", second)):
        file = Path("runs") / name / "evals" / "ev" / "result.json"
        samples = tuple(
            Sample(f"q{n}", value=float(value), input=f"What is  {n // 3}?" if known else None)
            for n, value in enumerate(values)
        )
        measure = Measure("ev", "checks", "passes", "checks passed", samples, file)
        log = EvalLog(eval="ev", suite="checks", file=file, measures=(measure,))
        run = RunMeasurements(name, file.parents[2], {}, {}, {}, {}, (), (log,))
        arms[name] = ArmMeasurements(name, (run,))
    return Measurements(arms)
