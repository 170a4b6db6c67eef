"""What the words of a command line name: runs, bases, models, and names that a server has."""

import json

import pytest
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.models import known_by
from recipes_lib.evals.recipe import EvalRecipe, load_eval
from recipes_lib.evals.run import evaluate


@pytest.fixture
def checked(tmp_path):
    """A function that loads an eval recipe of one rule, answered by a server."""

    def make(url: str, *overrides: str) -> EvalRecipe:
        rule = {"prompt": "Name a metal.", "check": "contains", "expected": "gold"}
        (tmp_path / "rules.jsonl").write_text(json.dumps(rule) + "\n")
        path = tmp_path / "rules.yaml"
        path.write_text(
            "suite: {name: checks}\ndata: {questions: rules.jsonl}\n"
            f"generation: {{engine: openai, base_url: '{url}', max_new_tokens: 6}}\n"
        )
        return load_eval(path, overrides)

    return make


def test_a_model_that_only_a_server_knows_is_current_under_its_run_and_asked_once(
    runs_folder, checked
):
    with FaultyServer(answer="gold") as server:
        recipe = checked(server.url)
        (log,) = evaluate([recipe], [f"owner/{MODEL}"])
        assert known_by(log.target, recipe) == log.answers.fingerprint
        (again,) = evaluate([recipe], [log.target])  # the run's name, in place of the server's
        assert again == log and len(server.bodies) == 1
        (longer,) = evaluate([checked(server.url, "generation.max_new_tokens=7")], [log.target])
        assert server.bodies[1]["model"] == f"owner/{MODEL}" and longer.target == log.target
    with pytest.raises(RecipeError, match="only a server knows the weights of 'owner/test-model'"):
        evaluate([checked(server.url, "generation.engine=transformers")], [log.target])


def test_a_run_that_a_server_answers_is_current_and_has_no_recorded_precision(make_run, checked):
    make_run(MODEL, 1)
    with FaultyServer(answer="gold") as server:
        recipe = checked(server.url)
        (served,) = evaluate([recipe], [MODEL])
    assert known_by(MODEL, recipe) == served.answers.fingerprint
    assert (served.answers.dtype, served.answers.quantized) == (None, None)
    (here,) = evaluate([checked(server.url, "generation.engine=transformers")], [MODEL])
    assert (here.answers.dtype, here.answers.quantized) == ("float32", False)
