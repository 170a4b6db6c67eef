"""`recipes launch` without a cluster: profiles, the jobs of recipes and studies, what sbatch is
asked, what is shown of the jobs afterwards. Slurm's commands are stand-ins.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.study_files import write_tiny_study

from recipes_lib.core.errors import EnvironmentFault, RecipeError, RecipeErrors
from recipes_lib.slurm import status
from recipes_lib.slurm.profile import load_profile, profile_names

PROJECT = Path(__file__).resolve().parents[2]
Recipes = Callable[..., tuple[int, str, str]]
CPU = ("quickstart/lora-r8", "--accelerate", "cpu")
CHAIN = (*CPU, "--evals", "evals/quickstart/mt_bench.yaml")
NUMBERED = (
    'count="$(dirname "$0")/count"; n=$(cat "$count" 2> /dev/null || echo 10); echo $((n + 1))'
    ' > "$count"; '
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


# ---- Profiles ----


def test_every_shipped_profile_loads() -> None:
    assert {"example", "local-sandbox"} <= set(profile_names())
    for name in profile_names():
        assert load_profile(name).values.sbatch


def test_a_profile_is_passed_on_to_sbatch_and_flags_about_gpus_only_to_jobs_that_have_some(
    profile_file,
) -> None:
    path = profile_file(sbatch={"gres": "gpu:{gpus}", "exclusive": True, "qos": None, "mem": "4G"})
    profile = load_profile(str(path)).values
    assert profile.flags("train", 2, 2) == ["--gres=gpu:2", "--exclusive", "--mem=4G"]
    assert profile.flags("report", 0, 1) == ["--exclusive", "--mem=4G", "--partition=cpu"]
    assert profile.has_gpus and not load_profile("local-sandbox").values.has_gpus
    unlimited = load_profile(str(profile_file(sbatch={"time": "UNLIMITED"}))).values
    assert unlimited.flags("train", 0, 1) == ["--time=UNLIMITED"]


def test_what_is_wrong_with_a_profile_is_said_at_its_line_all_at_once(
    profile_file, recipes: Recipes
) -> None:
    path = profile_file(
        sbatch={"--gres": "gpu:1", "time": "00:05:00"},
        stages={"train": {"dependency": "afterok:1"}},
        gres="gpu:{gpus}",
        max_requeues=-1,
        env={"1x": "a"},
    )
    with pytest.raises(RecipeErrors) as refused:
        load_profile(str(path))
    said = str(refused.value)
    words = ("sbatch.--gres: ", "is set by recipes launch", "write sbatch.gres", "env.1x: ")
    assert [word for word in (*words, "max_requeues") if word not in said] == [], said
    assert f"{path}:" in said and recipes("check", path)[0] == 2
    old = path.with_name("old.yaml")
    old.write_text("sbatch: {}\npartition: gpu\n")
    code, _, err = recipes("launch", "quickstart/lora-r8", "--profile", old)
    assert code == 2 and "old.yaml:2: " in err and "write sbatch.partition" in err, err
    code, _, err = recipes("launch", "quickstart/lora-r8", "--profile", "exampel")
    assert code == 2 and "example" in err


# ---- What is submitted ----


def launch(recipes: Recipes, *words: object) -> str:
    code, out, err = recipes("launch", *words)
    assert code == 0, out + err
    return out


def dry_run(recipes: Recipes, *words: object) -> str:
    return launch(recipes, *words, "--dry-run")


def test_the_time_limit_is_the_profiles(profile_file, recipes: Recipes, root: Path) -> None:
    """Issue: 03:00:00 became 00:30:00 for a training that had taken 48 minutes."""
    path = profile_file(sbatch={"time": "03:00:00", "gres": "gpu:{gpus}"})
    words = ("llama2-7b-dolly/qlora-r32", "--profile", path, "--stages", "train")
    said = dry_run(recipes, *words)
    limits = re.findall(r"--time=(\S+)", said)
    assert limits == ["03:00:00"], said
    assert "(estimated); the job's limit is 03:00:00" in said


def test_a_recipe_becomes_training_evaluations_and_a_report_each_after_the_one_before(
    profile_file, recipes: Recipes, root: Path, stand_in
) -> None:
    calls = stand_in("sbatch", NUMBERED + 'echo "$n;here"')
    stand_in("squeue", "true")
    evals = [PROJECT / f"evals/quickstart/{name}.yaml" for name in ("house_style", "mt_bench")]
    words = ("quickstart/lora-r8", "--profile", profile_file(sbatch={"partition": "a"}))
    said = launch(recipes, *words, "--accelerate", "cpu", "--evals", *evals)
    asked = [call.split() for call in calls.read_text().split("---\n")[:-1]]
    folder = root / "quickstart--lora-r8" / "slurm"
    waits = ["--kill-on-invalid-dep=yes"]
    names = ["eval-quickstart--house_style", "eval-quickstart--mt_bench"]
    assert [call[1:] for call in asked] == [
        [str(folder / "train.sbatch")],
        *(["--dependency=afterok:10", *waits, str(folder / f"{name}.sbatch")] for name in names),
        ["--dependency=afterok:11:12", *waits, str(folder / "report.sbatch")],
    ]
    assert "train: job 10" in said
    jobs = {task.label: task.job for task in status.submitted_tasks(folder)}
    assert jobs["report"] == "13"
    code, _, err = recipes("launch", *words, "--accelerate", "cpu", "--stages", "eval")
    assert code == 2 and "so there is nothing to evaluate" in err


def test_a_study_becomes_an_array_of_arms_and_a_job_that_evaluates_what_is_trained(
    profile_file, recipes: Recipes, tiny_model_dir: Path, tmp_path: Path, root: Path
) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    path = profile_file(sbatch={"partition": "a"}, max_concurrent_arms=1)
    said = dry_run(recipes, study, "--profile", path)
    assert "--array=0-1%1" in said and "--dependency=afterany:${train}" in said
    assert "run.name=" not in said and "recipes_lib.train" in said
    assert f"study run {study} --no-train" in said
    launch(recipes, study, "--profile", path, "--prepare")
    handed = sorted(file.name for file in (root / "tiny/slurm").glob("tiny--*"))
    assert len(handed) == 2 and handed[0].startswith("tiny--r4")
    assert (root / "tiny/slurm/train.sbatch").read_text().count("recipes_lib.train") == 2


def test_a_chain_whose_later_job_is_refused_leaves_nothing_queued(
    profile_file, recipes: Recipes, root: Path, stand_in
) -> None:
    error = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    stand_in("sbatch", f'{NUMBERED} [ $n = 10 ] && echo 10 || {{ echo "{error}" >&2; exit 1; }}')
    cancelled = stand_in("scancel", "true")
    path = profile_file(sbatch={"partition": "nowhere"})
    code, _, err = recipes("launch", *CHAIN, "--profile", path)
    assert code == 2 and cancelled.read_text() == "10\n---\n"
    assert f"{path}:2: Slurm refuses eval-quickstart--mt_bench: Invalid partition name" in err, err
    assert "--partition=gpu-long" in err and "nothing is queued" in err
    assert not (root / "quickstart--lora-r8/slurm/jobs.json").exists()


def test_without_slurm_the_message_says_what_to_do(
    profile_file, recipes: Recipes, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    words = (*CPU, "--stages", "train", "--profile", profile_file())
    code, _, err = recipes("launch", *words)
    assert code == 5 and "sbatch is not on this machine" in err and "--dry-run" in err


def test_the_lines_of_a_dry_run_can_be_pasted_into_bash(
    profile_file, recipes: Recipes, root: Path, stand_in
) -> None:
    calls = stand_in("sbatch", NUMBERED + "echo $n")
    stand_in("recipes", f'exec "{sys.executable}" -m recipes_lib.cli "$@"')
    said = dry_run(recipes, *CHAIN, "--profile", profile_file())
    assert not root.exists()
    lines = [line for line in said.splitlines() if line.startswith("recipes launch")]
    arguments = " ".join(map(str, ("launch", *CHAIN, "--profile", profile_file(), "--prepare")))
    script = said.replace(lines[0], f"recipes {arguments}")
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    asked = calls.read_text().split("---\n")[:-1]
    assert len(asked) == 3 and "afterok:10" in asked[1] and "afterok:11" in asked[2]
    tasks = status.submitted_tasks(root / "quickstart--lora-r8/slurm")
    assert [task.job for task in tasks] == ["10", "11", "12"]


def test_values_that_look_like_flags_or_commands_reach_no_shell(
    profile_file, recipes: Recipes, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "it's $HOME"
    odd.mkdir()
    monkeypatch.chdir(odd)
    path = profile_file(sbatch={"comment": "$(touch oops)", "constraint": "a&b"})
    words = (*CPU, "run.notes='`touch oops`'", "--stages", "train", "--profile", path)
    launch(recipes, *words, "--prepare")
    script = root / "quickstart--lora-r8/slurm/train.sbatch"
    text = script.read_text()
    assert "#SBATCH '--comment=$(touch oops)'" in text and "`touch" not in text
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_a_wrong_launch_says_what_is_wrong(profile_file, recipes: Recipes, root: Path) -> None:
    site, none = profile_file(), profile_file("none", sbatch={"partition": "a"})
    gpu = "llama2-7b-dolly/qlora-r8"
    cases = [
        (("quickstart/lora-r8", "--stages", "trian", "--profile", site), "no stage 'trian'"),
        ((gpu, "--stages", "train", "--profile", none), "asks for no GPUs"),
        (("quickstart/lora-r8",), "--profile is missing"),
        (("quickstart/lora-r8", "--mem=4G", "--profile", site), "put options of the site"),
        (("quickstart/lora-r8", "again", "--profile", site), "neither an option nor"),
        (("recipes/quickstart", "--profile", site), "is a folder"),
    ]
    wrong = []
    for words, what in cases:
        code, out, err = recipes("launch", *words)
        if code != 2 or what not in err:
            wrong.append((words, code, out, err))
    assert not wrong


def test_a_judge_that_is_expected_on_the_machine_is_started_by_the_job(
    profile_file, recipes: Recipes, root: Path, stand_in
) -> None:
    words = (*CPU, "--evals", "evals/mt_bench.yaml")
    none = dry_run(recipes, *words, "--profile", profile_file("none"))
    assert "no job starts the judge" in none and "with_judge.sh" not in none
    stand_in("vllm", "true")
    said = dry_run(recipes, *words, "--profile", profile_file(vllm="vllm"))
    assert "no job starts the judge" not in said and "with_judge.sh prometheus-eval/" in said


# ---- Afterwards ----


@pytest.fixture
def launched(root: Path) -> Path:
    """The folder of a study of two arms that was submitted."""
    folder = root / "tiny" / "slurm"
    folder.mkdir(parents=True)
    rows = [
        {"label": "train", "id": "7", "tasks": ["tiny--r4", "tiny--r8"]},
        {"label": "eval", "id": "8", "tasks": ["study run"]},
    ]
    (folder / "jobs.json").write_text(json.dumps({"jobs": rows}))
    return folder


def test_one_squeue_and_one_sacct_tell_what_became_of_all_jobs(
    launched: Path, stand_in, recipes: Recipes
) -> None:
    squeue = stand_in("squeue", "echo '7_1|RUNNING|None|node3'; echo '8|PENDING|Dependency|'")
    sacct = stand_in("sacct", "echo '7_0|CANCELLED by 1000'")
    out = launch(recipes, "status", "tiny")
    assert squeue.read_text().count("---") == sacct.read_text().count("---") == 1
    rows = [line.split() for line in out.splitlines()]
    assert ["7_0", "train.0", "tiny--r4", "cancelled"] in rows
    assert ["7_1", "train.1", "tiny--r8", "running", "node3"] in rows
    assert ["8", "eval", "study", "run", "pending", "Dependency"] in rows
    (launched / "train.0.exit_code").write_text("3\n")
    errors = launched / "train.0.errors"
    errors.mkdir()
    (errors / "1").write_text("rank 0: loss is nan")
    (launched / "train.0.log").write_text("one\ntwo\n")
    out = launch(recipes, "status", "tiny")
    assert "exit code 3" in out and "train.0: rank 0: loss is nan" in out
    out = launch(recipes, "logs", "tiny", "--stage", "train.0", "--lines", 1)
    assert "first error: rank 0: loss is nan" in out and "two" in out and "one\n" not in out


def test_cancel_names_only_what_is_not_over_and_a_second_launch_is_refused(
    launched: Path, stand_in, recipes: Recipes
) -> None:
    stand_in("squeue", "echo '7_1|RUNNING|None|node3'")
    stand_in("sacct", "exit 1")
    cancelled = stand_in("scancel", "true")
    assert "cancelled 7" in launch(recipes, "cancel", "tiny")
    assert cancelled.read_text() == "7\n---\n"
    with pytest.raises(RecipeError, match=r"is launched already: train\.1 is running"):
        status.refuse_if_active("tiny")
    stand_in("squeue", "echo 'slurm_load_jobs error: connect failure' >&2; exit 1")
    with pytest.raises(EnvironmentFault, match="Slurm gives no answer"):
        status.refuse_if_active("tiny")
    assert recipes("launch", "cancel", "tiny")[0] == 5
    code, _, err = recipes("launch", "logs", "nobody")
    assert code == 2 and "launched: tiny" in err


def test_waiting_does_not_ask_slurm_in_a_tight_loop(
    launched: Path, stand_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: `--wait` asked every two seconds, with a call for each job."""
    calls = stand_in("squeue", NUMBERED + "[ $n -ge 12 ] || echo '8|RUNNING|None|node3'")
    stand_in("sacct", "exit 1")
    for label in ("train.0", "train.1", "eval"):
        (launched / f"{label}.exit_code").write_text("0\n" if label != "eval" else "6\n")
    slept: list[float] = []
    monkeypatch.setattr(status.time, "sleep", slept.append)
    assert status.wait("tiny") == 6
    assert calls.read_text().count("---") == 3 and [
        seconds for seconds in slept if seconds > 1
    ] == [30.0, 30.0]
