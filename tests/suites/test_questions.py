"""Questions and answers from files: formats, missing and repeated ids, references."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from recipes_lib.core.errors import DataError
from recipes_lib.eval_recipe import load_eval
from recipes_lib.suites.answering import answers_in_file
from recipes_lib.suites.questions import Question, load_questions, read_answer_file

QUICK = Path(__file__).resolve().parents[2] / "evals/quickstart"


def mt_bench(*overrides):
    return load_eval(QUICK / "mt_bench.yaml", overrides)


def test_quickstart_questions_come_with_references_where_they_are_needed():
    loaded = load_questions(mt_bench())
    assert [question.category for question in loaded.questions if question.reference] == [
        "reasoning",
        "math",
        "coding",
    ]
    assert loaded.missing_references == () and loaded.subset is None


def test_fewer_questions_are_stamped_as_a_subset():
    assert load_questions(mt_bench("data.max_questions=3")).subset == "subset, n=3 of 8"


def test_real_mt_bench_files_load_and_missing_references_are_listed(shared_data, tmp_path):
    folder = shared_data / "mt_bench"
    loaded = load_questions(
        mt_bench(
            f"data.questions={folder}/question.jsonl",
            f"data.references={folder}/reference_answer/gpt-4.jsonl",
        )
    )
    assert (
        len(loaded.questions) == 80
        and sum(question.reference is not None for question in loaded.questions) == 30
    )
    some = tmp_path / "references.jsonl"
    some.write_text((folder / "reference_answer/gpt-4.jsonl").read_text().split("\n")[0] + "\n")
    loaded = load_questions(
        mt_bench(f"data.questions={folder}/question.jsonl", f"data.references={some}")
    )
    assert len(loaded.missing_references) == 29


def test_fastchat_answers_are_read_and_another_question_set_is_refused(shared_data):
    folder = shared_data / "mt_bench"
    questions = load_questions(
        mt_bench(f"data.questions={folder}/question.jsonl", "data.references=null")
    ).questions
    answers = read_answer_file(folder / "model_answer/llama-2-chat7b.jsonl", questions)
    assert len(answers) == 160 and answers.generator == "llama-2-chat7b"
    with pytest.raises(DataError, match="16 of 16 answers are missing"):
        read_answer_file(
            folder / "model_answer/llama-2-chat7b.jsonl", load_questions(mt_bench()).questions
        )


def test_alpaca_outputs_are_matched_by_instruction_in_any_order(shared_data):
    folder = shared_data / "alpaca_eval"
    path = folder / "alpaca_eval_reference_text_davinci_003.json"
    questions = load_questions(
        load_eval(QUICK / "alpaca_eval.yaml", [f"data.questions={path}"])
    ).questions
    answers = read_answer_file(folder / "llama-2-7b-chat-hf/model_outputs.json", questions)
    assert len(questions) == 805 and len(answers) == 805


def test_a_file_of_twenty_thousand_answers_is_matched_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    questions = [Question(str(number), (f"question {number}",)) for number in range(20_000)]
    path = tmp_path / "answers.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": question.turns[0], "output": "yes", "generator": "m"}
                for question in questions
            ]
        )
    )
    started = time.process_time()
    assert len(answers_in_file(path, questions).rows) == 20_000
    assert time.process_time() - started < 5  # it was quadratic: a minute


def test_repeated_ids_empty_files_and_wrong_columns_are_named(tmp_path):
    path = tmp_path / "q.json"
    recipe = (
        load_eval(QUICK / "alpaca_eval.yaml", [f"data.questions={path}"]) if path.exists() else None
    )
    for rows, words in (
        ([{"id": 1, "instruction": "a", "output": "b"}] * 2, "occur twice: 1"),
        ([], "0 questions"),
        ([{"prompt": "a"}], "needs a text under 'instruction'"),
        ([{"instruction": "a", "output": 3}], "'output' must be text"),
    ):
        path.write_text(json.dumps(rows))
        recipe = load_eval(QUICK / "alpaca_eval.yaml", [f"data.questions={path}"])
        with pytest.raises(DataError, match=words):
            load_questions(recipe)


def test_answers_of_two_models_in_one_file_are_refused(tmp_path):
    questions = load_questions(
        load_eval(QUICK / "alpaca_eval.yaml", ["data.max_questions=2"])
    ).questions
    path = tmp_path / "two.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": question.turns[0], "output": "x", "generator": question.id}
                for question in questions
            ]
        )
    )
    with pytest.raises(DataError, match="answers of 2 models"):
        read_answer_file(path, questions)
