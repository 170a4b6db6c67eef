"""`recipes compare` asks whose results lie in a run's folder."""

import shutil

import pytest
from tests.evals.faulty_server import FaultyServer

from recipes_lib.evals.recipe import load_eval
from recipes_lib.evals.run import evaluate

RULES = """\
suite: {name: checks}
data: {questions: questions.jsonl}
generation: {max_new_tokens: 4}
"""
QUESTION = '{"prompt": "Say %d", "check": "regex", "expected": "a"}\n'


@pytest.fixture
def evaluated(make_run, tmp_path, runs_folder):
    """Two runs with a result each; the folder of all runs."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(QUESTION % n for n in range(4)))
    (tmp_path / "rules.yaml").write_text(RULES)
    for seed, name in enumerate(("one", "two"), 1):
        make_run(name, seed)
    evaluate([load_eval(tmp_path / "rules.yaml")], ["one", "two"])
    return runs_folder


def test_runs_with_their_own_results_are_compared(evaluated, said) -> None:
    assert "pass rate" in said("compare", "one", "two")


def test_a_run_folder_that_was_renamed_is_refused(evaluated, said) -> None:
    (evaluated / "one").rename(evaluated / "other")
    told = said("compare", "other", "two", code=4)
    assert "the folder is named other, and its run is one" in told
    (evaluated / "two").rename(evaluated / "one")
    (evaluated / "other").rename(evaluated / "two")
    assert "run.json" in said("compare", "one", "two", code=4)


def test_results_that_were_exchanged_are_refused(evaluated, said) -> None:
    (evaluated / "one/evals").rename(evaluated / "evals")
    (evaluated / "two/evals").rename(evaluated / "one/evals")
    (evaluated / "evals").rename(evaluated / "two/evals")
    told = said("compare", "one", "two", code=4)
    assert "this is a result of two, in the folder of one" in told
    assert "rules/result.json" in told and "evaluate again: " in told


def test_results_of_former_weights_are_refused(evaluated, make_run, tmp_path, said) -> None:
    shutil.move(evaluated / "one/evals", tmp_path / "evals")
    shutil.rmtree(evaluated / "one")
    make_run("one", 7)
    shutil.move(tmp_path / "evals", evaluated / "one/evals")
    told = said("compare", "one", "two", code=4)
    assert "this is a result of other weights than one has now" in told
    # without its weights nobody can say it: another machine may compare what it was given
    shutil.rmtree(evaluated / "one/adapter")
    assert "pass rate" in said("compare", "one", "two")


def test_results_that_a_server_answered_are_their_runs_own(
    make_run, tmp_path, runs_folder, said
) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(QUESTION % n for n in range(4)))
    (tmp_path / "rules.yaml").write_text(RULES)
    for seed, name in enumerate(("one", "two"), 1):
        make_run(name, seed)
        with FaultyServer() as server:
            server.as_asked = True
            words = ["generation.engine=openai", f"generation.base_url={server.url}"]
            evaluate([load_eval(tmp_path / "rules.yaml", words)], [name])
    assert "pass rate" in said("compare", "one", "two")
    shutil.rmtree(runs_folder / "one/adapter")
    shutil.copytree(runs_folder / "two/adapter", runs_folder / "one/adapter")
    assert "other weights than one has now" in said("compare", "one", "two", code=4)
