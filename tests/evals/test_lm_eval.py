"""lm-eval through our recipe: offline tasks, one cache per model, the numbers of plain lm_eval,
nothing run or read without permission, and mistakes in a task told in one line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.commands.eval import configure, lm_eval_overrides
from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.log import read_eval_log
from recipes_lib.evals.models import resolve
from recipes_lib.evals.recipe import load_eval
from recipes_lib.evals.run import evaluate
from recipes_lib.evals.suites.lm_eval import plain_command

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: multiple_choice
test_split: test
num_fewshot: 0
doc_to_text: "{{question}}:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def small_task(tmp_path):
    """An eval recipe with one multiple-choice task on a few rows."""
    rows = [
        {"question": f"Pick {n}", "choices": ["one", "two three"], "answer": n % 2}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(TASK)
    path = tmp_path / "my_lm_eval.yaml"
    path.write_text(
        "suite: {name: lm_eval, tasks: [tiny_choice], batch_size: 4}\ndata: {include_path: .,"
        " folder: .}\n"
    )
    return path


def change(recipe: Path, line: str) -> int:
    """Write one line of the task anew, and return its number."""
    key = line.partition(":")[0]
    kept = [old for old in TASK.splitlines() if not old.startswith(f"{key}:")]
    recipe.with_name("choice.yaml").write_text("\n".join([*kept, line, ""]))
    return len(kept) + 1


def test_two_adapters_and_their_base_are_scored_with_caches_of_their_own(
    small_task, make_run, tiny_model_dir
):
    one = make_run("one", 1)
    make_run("two", 2)
    recipe = load_eval(small_task)
    logs = evaluate([recipe], ["one", "two", str(tiny_model_dir)])
    (again,) = evaluate([recipe], ["two"])
    assert [log.target for log in logs][:2] == ["one", "two"]
    assert again.metrics == logs[1].metrics
    (metric,) = logs[0].metrics
    assert (metric.name, metric.n, metric.num_fewshot, metric.unit) == (
        f"{recipe.name}/tiny_choice/acc",
        8,
        0,
        "share",
    )
    assert metric.low <= metric.value <= metric.high
    folder = one / "evals" / recipe.name
    own = json.loads((folder / "lm_eval_results.json").read_text())
    assert own["results"]["tiny_choice"]["acc,none"] == metric.value
    assert (folder / "samples/samples_tiny_choice.jsonl").read_text().count("\n") == 8
    assert read_eval_log(logs[0].file).metrics == logs[0].metrics
    (some,) = evaluate([load_eval(small_task, ["suite.limit=5"])], ["one"])
    assert some.metrics[0].n == 5 and some.subset and some.banners == (some.subset,)


MISTAKES = {
    'doc_to_text: "{{qestion}}:"': "no column 'qestion'",
    "dataset_kwargs: {data_files: {test: gone.jsonl}}": "no such data file",
    "output_type: multiple_choise": "unknown output_type 'multiple_choise'",
    'doc_to_target: "{{answer"': "template",
    "metric_list: [{metric: accc}]": "no metric 'accc'",
}
ONLY_AT_RUN = {
    "test_split: tset": "tset",
}


def test_a_mistake_in_an_own_task_is_one_line_and_check_finds_it(
    small_task, make_run, monkeypatch, capsys
):
    make_run("one", 1)
    monkeypatch.chdir(small_task.parent)
    for line, words in (MISTAKES | ONLY_AT_RUN).items():
        place = f"choice.yaml:{change(small_task, line)}: "
        if line in MISTAKES and "metric" not in line:
            assert main(["check", str(small_task)]) == 2, line
            said = capsys.readouterr().err
            assert place in said and words in said, said
        code = main(["eval", str(small_task), "one"])
        said = capsys.readouterr().err
        assert code in (2, 4, 5) and words in said and "internal error" not in said, said
        assert "Traceback" not in said


CODE = {
    "doc_to_text: !function evil.f": "this task runs code: !function evil.f",
    "doc_to_text: !<!function> evil.f": "this task runs code: !function evil.f",
    "metric_list: [{metric: ./evil}]": "this task runs code: metric: ./evil",
    "generation_kwargs: {custom_generate: ./evil}": "custom_generate: ./evil",
    "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ran') }}\"": "could run code",
    "doc_to_text: \"{{ question|attr('__class__') }}\"": "could run code",
    "doc_to_text: \"{{ question['__cla' + 'ss__'] }}\"": "could run code",
    "doc_to_text: \"{{ '{0.__class__}'.format(question) }}\"": "could run code",
    "dataset_kwargs: {data_files: {test: /etc/passwd}}": "reads /etc/passwd",
    "dataset_kwargs: {data_files: /etc/passwd}": "reads /etc/passwd",
    "dataset_kwargs: {data_files: [link.jsonl]}": "reads link.jsonl",
}
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nf = lambda *_: 'x'\n"


def test_code_and_foreign_files_of_a_task_need_the_recipes_and_the_command_lines_word(
    small_task, make_run, monkeypatch, capsys
):
    make_run("one", 1)
    monkeypatch.chdir(small_task.parent)
    (small_task.parent / "evil.py").write_text(EVIL)
    (small_task.parent / "link.jsonl").symlink_to("/etc/passwd")
    for line, words in CODE.items():
        place = f"choice.yaml:{change(small_task, line)}:"
        for command in (["check"], ["eval", "one", "--trust-remote-code"]):
            assert main([command[0], str(small_task), *command[1:]]) == 2, line
            said = capsys.readouterr().err
            assert place in said and words in said, (line, said)
            assert "generation.trust_remote_code: true" in said
        trusted = ["eval", str(small_task), "one", "generation.trust_remote_code=true"]
        assert main(trusted) == 2
        assert "pass --trust-remote-code as well" in capsys.readouterr().err
        assert not (small_task.parent / "ran").exists()
    change(small_task, "doc_to_text: !function evil.f")
    recipe = load_eval(small_task, ["generation.trust_remote_code=true"])
    assert evaluate([recipe], ["one"], remote_code=True)
    assert (small_task.parent / "ran").exists()


def test_options_that_let_code_run_need_both_words(small_task, make_run, capsys):
    make_run("one", 1)
    for line in ("confirm_run_unsafe_code: true", "gen_kwargs: 'custom_generate=x'"):
        small_task.write_text(
            "suite:\n  name: lm_eval\n  tasks: [tiny_choice]\n  options:\n"
            f"    {line}\ndata: {{include_path: ., folder: .}}\n"
        )
        assert main(["check", str(small_task)]) == 2
        assert "runs code" in capsys.readouterr().err


def test_unknown_tasks_and_options_are_named(small_task, make_run):
    make_run("one", 1)
    wrong = {
        "suite.options={not_an_option: 1}": "not_an_option",
        "suite.options={model: x}": r"suite\.options\.model is set",
        "suite.tasks=[tiny_choise]": r"no task 'tiny_choise'",
    }
    for override, words in wrong.items():
        with pytest.raises(RecipeError) as caught:
            evaluate([load_eval(small_task, [override])], ["one"])
        assert words.replace("\\", "") in str(caught.value), override
    with pytest.raises(RecipeError, match="no meaning for lm_eval"):
        evaluate([load_eval(small_task)], ["one"], "base")


def test_lm_evals_flags_reach_the_suite_as_they_were_meant(small_task):
    parser = argparse.ArgumentParser()
    configure(parser)
    cases = {
        ("--gen_kwargs", "max_gen_toks=8,temperature=0"): {
            "gen_kwargs": {"max_gen_toks": 8, "temperature": 0}
        },
        ("--gen_kwargs", 'until=["Q:", "\\n"],do_sample=false'): {
            "gen_kwargs": {"until": ["Q:", "\n"], "do_sample": False}
        },
        ("--system_instruction", "Note: yes # or no"): {"system_instruction": "Note: yes # or no"},
        ("--apply_chat_template", "--fewshot_as_multiturn", "false"): {
            "apply_chat_template": True,
            "fewshot_as_multiturn": False,
        },
        ("--tasks", "arc_easy, gsm8k", "--limit", "0.5"): {
            "tasks": ["arc_easy", "gsm8k"],
            "limit": 0.5,
        },
    }
    for words, section in cases.items():
        args = parser.parse_args(["x", "y", *words])
        suite = load_eval(small_task, lm_eval_overrides(args)).suite
        assert {name: getattr(suite, name) for name in section} == section


def test_the_printed_command_carries_every_option_that_lm_eval_has_a_flag_for(
    small_task, make_run, monkeypatch
):
    make_run("one", 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["suite.apply_chat_template=true", "suite.fewshot_as_multiturn=false"]
    words += ["suite.num_fewshot=2", "suite.gen_kwargs={max_gen_toks: 4}", "suite.batch_size=auto"]
    words += ["suite.options={fewshot_random_seed: 7, bootstrap_iters: 10}"]
    recipe = load_eval(small_task, words)
    line = plain_command(recipe, resolve(["one"], recipe)["one"])
    for part in ("--fewshot_as_multiturn false", "--num_fewshot 2", "--gen_kwargs max_gen_toks=4"):
        assert part in line
    assert "--seed 0,1234,1234,7" in line and "--batch_size 8" in line
    assert line.endswith("# lm_eval has no flag for bootstrap_iters")


@pytest.mark.slow
def test_recipes_eval_equals_lm_eval_to_the_last_digit(small_task, make_run, tmp_path):
    """A LoRA adapter on the tiny base, both programs from the command line."""
    run = make_run("one", 1)
    (log,) = evaluate([load_eval(small_task)], ["one"])
    line = str(log.lm_eval_command).removeprefix("(cd ").removesuffix(")")
    words = (line.partition(" && ")[2] or line).split(" ")[1:]
    plain = tmp_path / "plain"
    command = [sys.executable, "-m", "lm_eval", *words, "--output_path", str(plain)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=280)
    (theirs,) = (json.loads(path.read_text()) for path in plain.rglob("results_*.json"))
    mine = json.loads((run / f"evals/{log.eval}/lm_eval_results.json").read_text())
    assert mine["results"] == theirs["results"] and mine["n-samples"] == theirs["n-samples"]
