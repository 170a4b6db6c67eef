"""Chains on a real Slurm: what it refuses, what a study becomes, and that either everything is queued or nothing."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from tests.studies.study_files import PROJECT, write_tiny_study

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("keys", "line", "words"),
    [
        ({"partition": "nope"}, 2, ["invalid partition", "partition is nope", "partitions here: debug, urgent"]),
        ({"time": "99-00:00:00"}, 3, ["time limit is invalid", "time is 99-00:00:00"]),
        ({"gres": "gpu:a100:{gpus}"}, 4, ["node configuration is not available", "no node has", "--gres=gpu:a100:1"]),
        ({"cpus_per_gpu": 99}, 5, ["processors", "cpus_per_gpu is 99"]),
        ({"memory_gib_per_gpu": 900}, 6, ["Slurm refuses"]),
        ({"extra_sbatch": ["--nonsense"]}, 9, ["unrecognized option", "extra_sbatch"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_slurm_refuses_is_placed_at_the_line_of_the_profile(cluster, tiny, keys, line, words) -> None:
    profile = cluster.profile("wrong", **keys)
    config = "single_gpu" if "gres" in keys else "cpu"
    for action in ((), ("--test-only",)):
        done = cluster.recipes("launch", "tiny.yaml", "--profile", str(profile), "--stages", "train", "--accelerate", config, *action)
        assert done.returncode == 2 and f"{profile.name}:{line}: Slurm refuses the stage train:" in done.stderr, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert cluster.queue() == []


def test_a_chain_whose_later_stage_is_refused_leaves_nothing_queued(cluster, tiny) -> None:
    profile = cluster.profile("half", partition={"train": "debug", "eval": "debug", "report": "nope"})
    done = cluster.recipes("launch", "tiny.yaml", "--profile", str(profile), "--stages", "train,report", "run.name=half")
    assert done.returncode == 2
    assert "Slurm refuses the stage report" in done.stderr and "nothing is queued: train had been accepted" in done.stderr
    cluster.wait_for(lambda: cluster.queue() == [], "an empty queue", seconds=30)
    assert not (cluster.runs / "half" / "slurm" / "jobs.json").exists()
    assert "nothing was launched as 'half'" in cluster.recipes("launch", "status", "half").stderr


def test_test_only_asks_and_queues_nothing(cluster, tiny) -> None:
    done = cluster.recipes("launch", "tiny.yaml", "--profile", str(cluster.profile()), "--test-only", "run.name=asked-only")
    assert done.returncode == 0 and re.search(r"^train: Job \d+ to start at", done.stdout, re.MULTILINE), done.stderr
    assert "report: Job" in done.stdout
    assert cluster.queue() == [] and not (cluster.runs / "asked-only").exists()


def test_a_study_becomes_an_array_of_arms_evaluations_and_a_report(cluster, tiny_model_dir) -> None:
    study = write_tiny_study(cluster.work / "study", tiny_model_dir, steps=4, questions=4)
    profile = cluster.profile("study", max_concurrent_arms=2)
    said = cluster.launch(str(study), "--profile", str(profile))
    assert re.search(r"train: job \d+ \(2 arms\)", said) and "report: job" in said
    edited = study.parent / "r4.yaml"
    edited.write_text(edited.read_text().replace("1.0e-2", "5.0"))  # too late: the queued jobs have their own copy
    states = cluster.ended("tiny", seconds=500)
    logs = {label: cluster.log("tiny", label) for label in states}
    assert {state["state"] for state in states.values()} == {"COMPLETED"}, logs
    assert set(states) == {"train.0", "train.1", "eval-base", "eval-r4", "eval-r8", "eval-judge", "report"}
    report = cluster.runs / "tiny" / "report"
    assert (report / "report.html").is_file() and json.loads((report / "numbers.json").read_text())
    assert yaml.safe_load((cluster.runs / "tiny--r4" / "resolved.yaml").read_text())["train"]["learning_rate"] == 0.01
    assert "the model answers as when it was trained" in logs["train.1"]


def test_an_arm_that_fails_stops_its_evaluation_and_the_report_and_no_other_arm(cluster, tiny_model_dir) -> None:
    study = write_tiny_study(cluster.work / "broken", tiny_model_dir, steps=3, questions=2)
    study = study.rename(study.with_name("broken.yaml"))
    text = study.read_text()
    study.write_text(text.replace("r8: r8.yaml", "r8: {recipe: r8.yaml, overrides: [train.learning_rate=1e30, lora=null]}"))
    cluster.launch(str(study), "--profile", str(cluster.profile("study", max_concurrent_arms=2)), "--stages", "train,eval,report")
    states = cluster.ended("broken", seconds=500)
    assert (states["train.0"]["state"], states["eval-r4"]["state"]) == ("COMPLETED", "COMPLETED"), cluster.log("broken", "eval-r4")
    assert (states["train.1"]["state"], states["train.1"]["exit_code"]) == ("FAILED", 3), cluster.log("broken", "train.1")
    assert {states[name]["state"] for name in ("eval-r8", "eval-judge", "report")} == {"CANCELLED"}


def test_an_evaluation_that_is_asked_to_stop_is_ended_queued_again_and_continues(cluster) -> None:
    folder = cluster.work / "stages"
    folder.mkdir()
    (folder / "env.sh").write_text("MAX_REQUEUES=3\n")
    (folder / "eval.processes").write_text("1 NO\n")
    (folder / "eval.args").write_text(f"bash\n-c\necho began >> {folder}/began; [ $(wc -l < {folder}/began) -gt 1 ] || sleep 100\n")
    words = [
        "--parsable",
        "-t",
        "5",
        "--signal=B:USR2@60",
        "-o",
        f"{folder}/eval.log",
        str(PROJECT / "launch" / "job.sbatch"),
        str(folder),
        "eval",
    ]
    job = cluster.call("sbatch", *words).stdout.strip()
    cluster.wait_for((folder / "began").is_file, "the first try")
    cluster.call("scancel", "--batch", "--signal=USR2", job)
    cluster.over([job], lambda: (folder / "eval.log").read_text())
    assert (folder / "began").read_text() == "began\nbegan\n", (folder / "eval.log").read_text()
    assert (folder / "eval.exit_code").read_text() == "0\n"


def test_plain_sbatch_trains_a_recipe(cluster, tiny) -> None:
    script = str(PROJECT / "launch" / "job.sbatch")
    words = ["--parsable", "-t", "15", "-o", str(cluster.work / "plain.log"), script, "tiny.yaml", "run.name=plain", "train.max_steps=2"]
    job = cluster.call("sbatch", *words, "--accelerate", "cpu").stdout.strip()
    cluster.over([job], (cluster.work / "plain.log").read_text)
    assert cluster.run_state("plain")["state"] == "finished", (cluster.work / "plain.log").read_text()
