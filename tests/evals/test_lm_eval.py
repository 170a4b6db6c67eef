"""lm-eval through our recipe: the numbers of plain lm_eval, no task file of somebody else without
permission, and one line about a mistake in a task.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests.families import BOTH_TASKS, CHOICE_TASK

from recipes_lib.cli import main
from recipes_lib.core.errors import RecipeError
from recipes_lib.evals.recipe import load_eval
from recipes_lib.evals.run import evaluate
from recipes_lib.evals.suites.lm_eval import _short_probes, load_tasks

PROJECT = Path(__file__).resolve().parents[2]
TASK = CHOICE_TASK + BOTH_TASKS


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
        " folder: .}\ngeneration: {trust_remote_code: true}\n"
    )
    return path


def test_each_model_has_a_cache_of_its_own(small_task, make_run, tiny_model_dir):
    runs = [make_run("one", 1), make_run("two", 2)]
    recipe = load_eval(small_task)
    logs = evaluate([recipe], ["one", "two", str(tiny_model_dir)], remote_code=True)
    assert [log.target for log in logs][:2] == ["one", "two"]
    (metric,) = logs[0].metrics
    assert metric.name == f"{recipe.name}/tiny_choice/acc"
    assert (metric.n, metric.num_fewshot, metric.unit) == (8, 0, "share")
    assert metric.low <= metric.value <= metric.high
    folders = [run / "evals" / recipe.name for run in runs]
    own = json.loads((folders[0] / "lm_eval_results.json").read_text())
    assert own["results"]["tiny_choice"]["acc,none"] == metric.value
    first, second = (
        (folder / "samples/samples_tiny_choice.jsonl").read_text() for folder in folders
    )
    assert first.count("\n") == 8 and first != second


def test_other_rows_are_another_evaluation(small_task, make_run, tmp_path):
    """In a file that the task names, or in a folder."""
    make_run("one", 1)
    for place in ("tasks", "kept/data"):
        (tmp_path / place).mkdir(parents=True)
    small_task.with_name("choice.yaml").rename(tmp_path / "tasks/choice.yaml")
    recipe = load_eval(small_task, [f"data.include_path={tmp_path}/tasks"])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    two = TASK.replace("[{metric: acc,", "[{metric: acc_norm, aggregation: mean}, {metric: acc,")
    by_folder = two.replace("{data_files: {test: rows.jsonl}}", "{data_dir: kept/data}")
    for text, rows in ((two, "rows.jsonl"), (by_folder, "kept/data/test.jsonl")):
        (tmp_path / "tasks/choice.yaml").write_text(text)
        for count in (8, 6):
            (tmp_path / rows).write_text("".join(lines[:count]))
            (log,) = evaluate([recipe], ["one"], remote_code=True)
            assert log.metrics[0].n == log.n == count, rows  # both metrics ask the same


def test_a_base_of_a_relative_path_is_evaluated_wherever_the_tasks_work(
    small_task, runs_folder, tiny_model_dir, tmp_path, monkeypatch
):
    (tmp_path / "rows").mkdir()
    small_task.with_name("rows.jsonl").rename(tmp_path / "rows/rows.jsonl")
    monkeypatch.chdir(tiny_model_dir.parent)
    words = [f"data.folder={tmp_path}/rows"]
    for batch_size in (4, 2):  # the second time its run folder is there
        recipe = load_eval(small_task, [*words, f"suite.batch_size={batch_size}"])
        (log,) = evaluate([recipe], [f"./{tiny_model_dir.name}"], remote_code=True)
        config = yaml.safe_load(Path(command_words(str(log.lm_eval_command))[1][-1]).read_text())
        assert Path(config["model_args"]["pretrained"]) == tiny_model_dir
    monkeypatch.chdir(tmp_path)
    recipe = load_eval(small_task, [*words, "suite.batch_size=1"])
    assert evaluate([recipe], [log.target], remote_code=True)[0].target == log.target


def test_a_group_of_ones_own_may_name_tasks_of_lm_eval(small_task, tmp_path, monkeypatch):
    from lm_eval import tasks

    class Tasks(tasks.TaskManager):
        """Has the small task in place of lm-eval's 14,000, which take ten seconds."""

        def __init__(self, include_path: str, include_defaults: bool = True) -> None:
            library = [str(tmp_path)] if include_defaults else []
            super().__init__(include_path=[*library, include_path], include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Tasks)
    (tmp_path / "own").mkdir()
    for task in ("tiny_choice", "{task: tiny_choice, num_fewshot: 1}"):
        (tmp_path / "own/group.yaml").write_text(f"group: mine\ntask: [{task}]\n")
        words = [f"data.include_path={tmp_path}/own", "suite.tasks=[mine]"]
        assert load_tasks(load_eval(small_task, words), remote_code=True) == 8
    recipe = load_eval(small_task, ["suite.tasks=['tiny_*']"])
    assert load_tasks(recipe, remote_code=True) == 8


def test_items_that_ask_the_same_are_one_question_and_chosen_ones_a_subset(
    small_task, make_run, tmp_path
):
    """Five times the same eight rows are eight questions: the interval is as wide."""
    make_run("one", 1)
    logs = []
    rows = (tmp_path / "rows.jsonl").read_text()
    for times in (1, 5):
        (tmp_path / "rows.jsonl").write_text(rows * times)
        logs += evaluate([load_eval(small_task)], ["one"], remote_code=True)
    once, often = (log.metrics[0] for log in logs)
    assert (once.n, often.n, logs[1].subset) == (8, 40, None)
    assert len({sample.same_as or sample.id for sample in often.samples}) == 8
    assert often.high - often.low > 0.8 * (once.high - once.low)
    words = ["suite.options={samples: {tiny_choice: [0, 3]}}"]
    (chosen,) = evaluate([load_eval(small_task, words)], ["one"], remote_code=True)
    assert chosen.subset == "subset, 2 chosen items of 40"


MISTAKES = {
    'doc_to_text: "{{qestion}}:"': "'qestion' is undefined",
    "dataset_kwargs: {data_files: {test: gone.jsonl}}": "gone.jsonl",
    "output_type: multiple_choise": "multiple_choise",
    'doc_to_target: "{{answer"': "TemplateSyntaxError",
    "test_split: tset": "tset",
}
OPTIONS = {
    "suite.options={wandb_args: {project: x}}": "wandb_args does nothing here",
    "suite.options={not_an_option: 1}": "not_an_option",
    "suite.options={model: x}": "multiple values for keyword argument 'model'",
}


def test_a_mistake_in_a_task_or_an_option_is_one_line(small_task, make_run, monkeypatch, capsys):
    make_run("one", 1)
    monkeypatch.chdir(small_task.parent)
    file = str(small_task)
    for line, words in MISTAKES.items():
        key = line.partition(":")[0]
        kept = [old for old in TASK.splitlines() if not old.startswith(f"{key}:")]
        small_task.with_name("choice.yaml").write_text("\n".join([*kept, line, ""]))
        for command in (["prefetch", file, "--check"], ["eval", file, "one"]):
            assert main([*command, "--trust-remote-code"]) in (2, 5), line
            said = "".join(capsys.readouterr())
            assert words in said and "Traceback" not in said and "internal error" not in said, said
    small_task.with_name("choice.yaml").write_text(TASK)
    for override, words in OPTIONS.items():
        assert main(["eval", file, "one", override, "--trust-remote-code"]) == 2, override
        assert words in capsys.readouterr().err, override
    with pytest.raises(RecipeError, match="does not apply to lm_eval"):
        evaluate([load_eval(small_task)], ["one"], "base")


def test_task_files_of_somebody_else_need_permission_twice(small_task, make_run, capsys):
    make_run("one", 1)
    evil = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nf = lambda *_: 'x'\n"
    (small_task.parent / "evil.py").write_text(evil)
    text = TASK.replace('doc_to_text: "{{question}}:"', "doc_to_text: !function evil.f")
    small_task.with_name("choice.yaml").write_text(text)
    small_task.write_text(small_task.read_text().replace("trust_remote_code: true", "seed: 0"))
    file, key, flag = str(small_task), "generation.trust_remote_code=true", "--trust-remote-code"
    for words in (["check", file], ["eval", file, "one", flag], ["eval", file, "one", key]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "my_lm_eval.yaml:2: data.include_path: task files are code" in said
        assert "generation.trust_remote_code: true" in said and flag in said
    assert not (small_task.parent / "ran").exists()
    assert main(["eval", file, "one", key, flag]) == 0
    assert (small_task.parent / "ran").exists()
    shipped = PROJECT / "evals/quickstart/lm_eval.yaml"
    assert load_eval(shipped)
    for option in ("confirm_run_unsafe_code: true", "gen_kwargs: {custom_generate: ./x}"):
        with pytest.raises(RecipeError, match="lets lm-eval run code"):
            load_eval(shipped, [f"suite.options={{{option}}}"])


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nf = lambda *_: 'x'\n"
CALLS = TASK.replace('doc_to_text: "{{question}}:"', "doc_to_text: !function evil.f")


@pytest.mark.parametrize("way", ["task", "relative", "include", "function", "class", "link"])
def test_no_way_into_the_loader_runs_code_without_permission(
    way, small_task, make_run, tmp_path, monkeypatch, capsys
):
    """A task as a path, or a file of this project that leads the loader out of it."""
    make_run("one", 1)
    project = tmp_path / "project"
    outside = tmp_path / "elsewhere"
    for folder in (project / "tasks", outside):
        folder.mkdir(parents=True)
    monkeypatch.setattr("recipes_lib.evals.recipe.project_root", lambda: project)
    (outside / "evil.py").write_text(EVIL)
    (outside / "task.yaml").write_text(CALLS)
    within = {
        "include": f"include: {outside}/task.yaml\n",
        "function": CALLS.replace("evil.f", f"{outside}/evil.f"),
        "class": f"task: tiny_choice\nclass: !function {outside}/evil.f\n",
    }
    file = project / "mine.yaml"
    if way in ("task", "relative"):
        task = "../elsewhere/task.yaml" if way == "relative" else f"{outside}/task.yaml"
        file.write_text(f"suite: {{name: lm_eval, tasks: [{task}]}}\ndata: {{folder: .}}\n")
    else:
        file.write_text(
            "suite: {name: lm_eval, tasks: [tiny_choice]}\ndata: {include_path: tasks, folder: .}\n"
        )
        if way == "link":
            (project / "tasks/choice.yaml").symlink_to(outside / "task.yaml")
        else:
            (project / "tasks/choice.yaml").write_text(within[way])
    key = "generation.trust_remote_code=true"
    for words in (["check", file], ["prefetch", file, "--check"], ["eval", file, "one", key]):
        assert main([str(word) for word in words]) == 2, words
        said = capsys.readouterr().err
        assert "task files are code" in said and str(outside) in said, said
    assert not (outside / "ran").exists()


def test_files_that_a_task_leads_to_are_part_of_what_was_asked(small_task, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/base.yaml").write_text(TASK)
    (tmp_path / "other/task.yaml").write_text("include: base.yaml\n")
    words = ["data.include_path=null", f"suite.tasks=[{tmp_path}/other/task.yaml]"]
    keys = {load_eval(small_task, words).settings_key()}
    (tmp_path / "other/base.yaml").write_text(TASK.replace("question", "query"))
    keys.add(load_eval(small_task, words).settings_key())
    (tmp_path / "rows.jsonl").write_text("{}\n")
    keys.add(load_eval(small_task, words).settings_key())
    assert len(keys) == 3


def test_a_run_computes_in_the_precision_of_its_training(small_task, make_run, monkeypatch):
    """As in the other suites; lm_eval turns off the autocast that it runs inside."""
    from transformers import LlamaForCausalLM

    seen = []
    forward = LlamaForCausalLM.forward

    def watched(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    make_run("full", 1)
    make_run("half", 1, dtype="bfloat16")
    for name, wanted in (("full", None), ("half", "bfloat16")):
        seen.clear()
        (log,) = evaluate([load_eval(small_task)], [name], remote_code=True)
        assert set(seen) == {wanted is not None}, name
        config = yaml.safe_load(Path(command_words(str(log.lm_eval_command))[1][-1]).read_text())
        assert config["model_args"].get("mixed_precision_dtype") == wanted


def test_a_batch_that_fits_is_sought_for_requests_as_long_as_these(
    tiny_model_dir, tiny_tokenizer, monkeypatch
):
    """Not for the model's whole context, which for many is a hundred times as long."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    harness = _short_probes(HFLM)(pretrained=model, tokenizer=tiny_tokenizer, batch_size="auto")
    context = harness.max_length
    tried = []

    def call(batch, **_):
        tried.append(tuple(batch.shape))
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(1, 1, 2)

    monkeypatch.setattr(harness, "_model_call", call)
    asked = {"until": ["\n"], "max_gen_toks": 3}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, asked), idx=0)
        for text in ("one", "one two three")
    ]
    assert len(harness.generate_until(requests)) == 2
    wanted = len(harness.tok_encode("one two three")) + 3
    assert {length for _, length in tried} == {wanted} and wanted < context
    assert tried[-1][0] == 4
    assert harness.max_length == context
    tried.clear()
    texts = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        for text in ("one", "one two three")
    ]
    monkeypatch.setattr(harness, "_loglikelihood_tokens", lambda requests, **_: [(0.0, True)] * 2)
    assert harness.loglikelihood_rolling(texts) == [0.0, 0.0]
    assert {length for _, length in tried} == {wanted - 3} and tried[-1][0] == 4
    assert harness.max_length == context


def command_words(line: str) -> tuple[str, list[str]]:
    """The folder and the words of a printed command."""
    folder, _, command = line.removeprefix("(cd ").partition(" && ")
    return folder, shlex.split(command.partition(")")[0])


@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of programs that import lm_eval
def test_recipes_eval_equals_lm_eval_to_the_last_digit(small_task, make_run, tmp_path):
    """A LoRA adapter on the tiny base, both programs from the command line: lm_eval alone, and in
    bfloat16 under accelerate launch, in one process (0.4.13 splits the work over GPUs only).
    """
    words = ["suite.limit=6", "suite.batch_size=auto", "suite.options={seed: 7}"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    outputs = [tmp_path / "float32", tmp_path / "bfloat16"]
    for output, launcher in zip(outputs, ([], launch), strict=True):
        run = make_run(f"in-{output.name}", 1, dtype=output.name)
        (log,) = evaluate([load_eval(small_task, words)], [run.name], remote_code=True)
        assert log.metrics[0].n == 6 and log.banners == (log.subset,)
        folder, command = command_words(str(log.lm_eval_command))
        ours = json.loads((run / f"evals/{log.eval}/lm_eval_results.json").read_text())
        command = [*launcher, "-m", *command, "--output_path", str(output), "--log_samples"]
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (theirs,) = (json.loads(path.read_text()) for path in output.rglob("results_*.json"))
        assert ours["results"] == theirs["results"] and ours["n-samples"] == theirs["n-samples"]
    assert main(["compare", *map(str, outputs)]) == 0
