"""Chains on a real Slurm: what it refuses, what a study becomes, and that either everything is
queued or nothing.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from tests.study.study_files import PROJECT, write_tiny_study

from recipes_lib.slurm.jobs import Job, Task
from recipes_lib.slurm.submission import script_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("keys", "line", "words"),
    [
        (
            {"partition": "nope"},
            2,
            ["invalid partition", "partition is nope", "partitions here: debug, urgent"],
        ),
        ({"time": "99-00:00:00"}, 3, ["time limit is invalid", "time is 99-00:00:00"]),
        (
            {"gres": "gpu:a100:{gpus}"},
            4,
            ["node configuration is not available", "no node has", "--gres=gpu:a100:1"],
        ),
        ({"cpus_per_gpu": 99}, 5, ["processors", "cpus_per_gpu is 99"]),
        ({"memory_gib_per_gpu": 900}, 6, ["Slurm refuses"]),
        ({"extra_sbatch": ["--nonsense"]}, 9, ["unrecognized option", "extra_sbatch"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_slurm_refuses_is_placed_at_the_line_of_the_profile(
    cluster, tiny, keys, line, words
) -> None:
    profile = cluster.profile("wrong", **keys)
    config = "single_gpu" if "gres" in keys else "cpu"
    for action in ((), ("--test-only",)):
        done = cluster.recipes(
            "launch",
            "tiny.yaml",
            "--profile",
            str(profile),
            "--stages",
            "train",
            "--accelerate",
            config,
            *action,
        )
        assert (
            done.returncode == 2
            and f"{profile.name}:{line}: Slurm refuses the stage train:" in done.stderr
        ), done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert cluster.queue() == []


def test_a_chain_whose_later_stage_is_refused_leaves_nothing_queued(cluster, tiny) -> None:
    profile = cluster.profile(
        "half", partition={"train": "debug", "eval": "debug", "report": "nope"}
    )
    done = cluster.recipes(
        "launch",
        "tiny.yaml",
        "--profile",
        str(profile),
        "--stages",
        "train,report",
        "run.name=half",
    )
    assert done.returncode == 2
    assert (
        "Slurm refuses the stage report" in done.stderr
        and "nothing is queued: train had been accepted" in done.stderr
    )
    cluster.wait_for(lambda: cluster.queue() == [], "an empty queue", seconds=30)
    assert not (cluster.runs / "half" / "slurm" / "jobs.json").exists()
    assert "nothing was launched as 'half'" in cluster.recipes("launch", "status", "half").stderr


def test_test_only_asks_and_queues_nothing(cluster, tiny) -> None:
    done = cluster.recipes(
        "launch",
        "tiny.yaml",
        "--profile",
        str(cluster.profile()),
        "--test-only",
        "run.name=asked-only",
    )
    assert done.returncode == 0 and re.search(
        r"^train: Job \d+ to start at", done.stdout, re.MULTILINE
    ), done.stderr
    assert "report: Job" in done.stdout
    assert cluster.queue() == [] and not (cluster.runs / "asked-only").exists()


def test_a_study_becomes_an_array_of_arms_evaluations_and_a_report(cluster, tiny_model_dir) -> None:
    study = write_tiny_study(cluster.work / "study", tiny_model_dir, steps=4, questions=4)
    profile = cluster.profile("study", max_concurrent_arms=2)
    said = cluster.launch(str(study), "--profile", str(profile))
    assert re.search(r"train: job \d+ \(2 arms\)", said) and "report: job" in said
    edited = study.parent / "r4.yaml"
    edited.write_text(
        edited.read_text().replace("1.0e-2", "5.0")
    )  # too late: the queued jobs have their own copy
    states = cluster.ended("tiny", seconds=500)
    logs = {label: cluster.log("tiny", label) for label in states}
    assert {state["state"] for state in states.values()} == {"COMPLETED"}, logs
    assert set(states) == {
        "train.0",
        "train.1",
        "eval-base",
        "eval-r4",
        "eval-r8",
        "eval-judge",
        "report",
    }
    report = cluster.runs / "tiny" / "report"
    assert (report / "report.html").is_file() and json.loads((report / "numbers.json").read_text())
    assert (
        yaml.safe_load((cluster.runs / "tiny--r4" / "resolved.yaml").read_text())["train"][
            "learning_rate"
        ]
        == 0.01
    )
    assert "the model answers as when it was trained" in logs["train.1"]


def test_an_arm_that_fails_stops_its_evaluation_and_the_report_and_no_other_arm(
    cluster, tiny_model_dir
) -> None:
    study = write_tiny_study(cluster.work / "broken", tiny_model_dir, steps=3, questions=2)
    study = study.rename(study.with_name("broken.yaml"))
    text = study.read_text()
    study.write_text(
        text.replace(
            "r8: r8.yaml", "r8: {recipe: r8.yaml, overrides: [train.learning_rate=1e30, lora=null]}"
        )
    )
    cluster.launch(
        str(study),
        "--profile",
        str(cluster.profile("study", max_concurrent_arms=2)),
        "--stages",
        "train,eval,report",
    )
    states = cluster.ended("broken", seconds=500)
    assert (states["train.0"]["state"], states["eval-r4"]["state"]) == ("COMPLETED", "COMPLETED"), (
        cluster.log("broken", "eval-r4")
    )
    assert (states["train.1"]["state"], states["train.1"]["exit_code"]) == ("FAILED", 3), (
        cluster.log("broken", "train.1")
    )
    assert {states[name]["state"] for name in ("eval-r8", "eval-judge", "report")} == {"CANCELLED"}


@pytest.fixture
def stage(cluster, request):
    """Writes the script of a stage eval, whose command runs until its second try, and the words
    that submit it.
    """
    folder = cluster.work / request.node.name[:40]
    folder.mkdir()
    command = f"echo began >> {folder}/began; [ $(wc -l < {folder}/began) -gt 1 ] || sleep 100"
    script = script_of(Job("eval", "eval", (Task((), ("bash", "-c", command)),)), folder, None)
    (folder / "eval.sbatch").write_text(script)
    return folder, ("--parsable", "-t", "5", "--signal=B:USR2@60", str(folder / "eval.sbatch"))


def test_an_evaluation_that_is_asked_to_stop_is_ended_queued_again_and_continues(
    cluster, stage
) -> None:
    folder, words = stage
    job = cluster.call("sbatch", *words).stdout.strip()
    cluster.wait_for((folder / "began").is_file, "the first try")
    cluster.call("scancel", "--batch", "--signal=USR2", job)
    cluster.over([job], lambda: (folder / "eval.log").read_text())
    assert (folder / "began").read_text() == "began\nbegan\n", (folder / "eval.log").read_text()
    assert (folder / "eval.exit_code").read_text() == "0\n"


def test_a_preempted_evaluation_is_queued_again_and_what_waits_for_it_keeps_waiting(
    cluster, stage
) -> None:
    folder, words = stage
    job = cluster.call("sbatch", "-p", "debug", *words).stdout.strip()
    after = cluster.call(
        "sbatch",
        "--parsable",
        f"--dependency=afterok:{job}",
        "--kill-on-invalid-dep=yes",
        "--wrap",
        f"touch {folder}/after",
    ).stdout
    cluster.wait_for((folder / "began").is_file, "the first try")
    cluster.call("sbatch", "-p", "urgent", "-N4", "--exclusive", "--wrap", "sleep 1")
    cluster.over([job, after.strip()], lambda: (folder / "eval.log").read_text())
    assert (folder / "began").read_text() == "began\nbegan\n", (folder / "eval.log").read_text()
    assert (folder / "eval.exit_code").read_text() == "0\n" and (folder / "after").exists()


def test_a_cancelled_evaluation_is_not_queued_again(cluster, stage) -> None:
    folder, words = stage
    job = cluster.call("sbatch", *words).stdout.strip()
    cluster.wait_for((folder / "began").is_file, "the first try")
    cluster.call("scancel", job)
    cluster.over([job], lambda: (folder / "eval.log").read_text())
    assert (folder / "began").read_text() == "began\n", (folder / "eval.log").read_text()
    assert "JobState=CANCELLED" in cluster.call("scontrol", "show", "job", job).stdout


def test_a_recipe_is_trained_judged_by_a_server_of_the_job_and_reported(
    cluster, tiny, tiny_model_dir
) -> None:
    write_tiny_study(cluster.work / "served", tiny_model_dir, questions=3)
    judge = cluster.work / "served" / "judge.yaml"
    served = {
        "model": "org/judge",
        "engine": "openai",
        "base_url": "http://127.0.0.1:8000/v1",
        "mode": "generate",
    }
    kept = yaml.safe_load(judge.read_text())["judge"]
    judge.write_text(
        judge.read_text().partition("\n")[0] + "\n" + yaml.safe_dump({"judge": {**kept, **served}})
    )
    vllm = cluster.work / "vllm"
    vllm.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{PROJECT}/tests/launch/served_judge.py" "$@"\n'
    )
    vllm.chmod(0o755)
    profile = cluster.profile("served", vllm=str(vllm))
    said = cluster.launch(
        "tiny.yaml",
        "--profile",
        str(profile),
        "--evals",
        "served/alpaca_eval.yaml",
        "run.name=judged",
        "train.max_steps=2",
    )
    assert "warning: org/judge is not on this machine" in said
    states = cluster.ended("judged")
    logs = {label: cluster.log("judged", label) for label in states}
    assert {label: state["state"] for label, state in states.items()} == dict.fromkeys(
        states, "COMPLETED"
    ), logs
    name = next(label for label in states if label.startswith("eval-"))
    assert "judge: answers after" in logs[name]
    assert "serve org/judge" in cluster.recipes("launch", "logs", "judged", "--stage", name).stdout
    assert (cluster.runs / "judged" / "report.html").is_file()


def test_the_pasted_lines_of_a_dry_run_are_the_chain(cluster, tiny) -> None:
    words = (
        "tiny.yaml",
        "--profile",
        str(cluster.profile("paste")),
        "--stages",
        "train,report",
        "run.name=pasted",
        "train.max_steps=2",
    )
    said = cluster.launch(*words, "--dry-run")
    assert not (cluster.runs / "pasted").exists()
    recipes = f'recipes() {{ "{sys.executable}" -m recipes_lib.cli "$@"; }}'
    done = cluster.call("bash", "-euc", f"{recipes}\n{said}\necho $train $report")
    assert done.returncode == 0, done.stderr
    cluster.over(done.stdout.split()[-2:], lambda: cluster.log("pasted"))
    assert cluster.run_state("pasted")["state"] == "finished", cluster.log("pasted")
    assert "has no evaluation" in cluster.log("pasted", "report") or "nothing to" in cluster.log(
        "pasted", "report"
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"SBATCH_EXPORT": "NONE"},
        {
            "SLURM_JOB_ID": "1",
            "SLURM_MEM_PER_CPU": "100",
            "SLURM_GPUS_ON_NODE": "3",
            "SLURM_RESTART_COUNT": "9",
            "SLURM_NNODES": "2",
        },
    ],
    ids=["a site that exports nothing", "from within another job"],
)
def test_what_the_shell_that_submits_holds_does_not_change_the_job(
    cluster, tiny, variables, monkeypatch
) -> None:
    name = "from-" + "-".join(variables)[:20].lower().replace("_", "-")
    for key, value in variables.items():
        monkeypatch.setitem(cluster.environment, key, value)
    profile = cluster.profile("inside", memory_gib_per_gpu=1, variables={"RECIPES_TEST": "kept"})
    words = (
        "--stages",
        "train",
        "--accelerate",
        "ddp_cpu",
        "--gpus",
        "2",
        f"run.name={name}",
        "train.max_steps=2",
    )
    cluster.launch("tiny.yaml", "--profile", str(profile), *words)
    assert cluster.ended(name)["train"]["state"] == "COMPLETED", cluster.log(name)
    assert "DDP, world size 2" in cluster.log(name) and "try=0" in cluster.log(name)


def test_a_script_that_is_edited_and_submitted_by_hand_trains_and_is_known_to_status(
    cluster, tiny
) -> None:
    """Written without a profile: what the site wants is typed. The folder's name holds what a
    shell, a directive and Slurm read as more.
    """
    cluster.environment["RECIPES_RUNS_ROOT"] = str(cluster.work / "it's 100% #1")
    try:
        folder = Path(
            cluster.launch(
                "tiny.yaml",
                "--prepare",
                "--accelerate",
                "cpu",
                "run.name=plain",
                "train.max_steps=2",
            ).strip()
        )
        script = folder / "train.sbatch"
        written = script.read_text()
        assert written.count("\nrun ") == 1
        script.write_text(written.replace("\nrun ", "\necho edited by hand\nrun "))
        job = cluster.call(
            "sbatch", "--parsable", "-t", "15", "-c", "1", str(script)
        ).stdout.strip()
        log = folder / "train.log"
        cluster.over(
            [job],
            lambda: (
                log.read_text()
                if log.is_file()
                else f"no log among {[file.name for file in folder.iterdir()]}"
            ),
        )
        said = log.read_text()
        assert "edited by hand" in said and "step 2/2" in said and "exit code 0" in said, said
        assert (
            json.loads(cluster.recipes("launch", "status", "plain", "--json").stdout)["plain"][0][
                "state"
            ]
            == "COMPLETED"
        )
    finally:
        cluster.environment["RECIPES_RUNS_ROOT"] = str(cluster.runs)
