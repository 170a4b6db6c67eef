"""Trainings as jobs of a real Slurm: sizes, exit codes, preemption, time limits, cancelling."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# 400 steps take some 15 seconds: long enough for Slurm to preempt the job before it is done, whose
# scheduler looks every few seconds.
STEPS = (
    "train.max_steps=400",
    "train.save_steps=100",
    "train.eval_steps=100",
    "lora.lora_dropout=0.3",
)


@pytest.fixture(scope="module")
def profile(cluster) -> str:
    return str(cluster.profile())


@pytest.fixture(scope="module")
def whole(cluster, tiny, profile) -> str:
    """A run of one process that nothing disturbs."""
    cluster.launch("tiny.yaml", "--profile", profile, "--stages", "train", "run.name=whole", *STEPS)
    states = cluster.ended("whole")
    assert states["train"]["state"] == "COMPLETED", cluster.log("whole")
    return "whole"


def test_a_job_trains_verifies_and_logs_into_the_run_directory(cluster, whole) -> None:
    assert cluster.run_state(whole)["state"] == "finished"
    log = cluster.log(whole)
    assert "world size 1" in log and "verified: these are the trained weights" in log
    assert "not checked" not in log  # the launch that was asked for is known inside the job


def test_two_nodes_of_two_processes_train_the_adapter_of_one_process(
    cluster, tiny, profile
) -> None:
    from safetensors.torch import load

    plain = ("train.max_steps=6", "train.per_device_train_batch_size=2")
    cluster.launch("tiny.yaml", "--profile", profile, "--stages", "train", "run.name=alone", *plain)
    words = ("--accelerate", "ddp_cpu", "--nodes", "2", "--gpus", "2", "run.name=four")
    cluster.launch("tiny.yaml", "--profile", profile, "--stages", "train", *words, *plain)
    for name in ("alone", "four"):
        assert cluster.ended(name)["train"]["state"] == "COMPLETED", cluster.log(name)
    log = cluster.log("four")
    assert "on node[1-2]: 2 node(s) x 2 process(es)" in log
    assert "DDP, world size 4" in log
    alone, four = load(cluster.adapter("alone")), load(cluster.adapter("four"))
    assert max(float((alone[name] - four[name]).abs().max()) for name in alone) < 1e-4


def test_a_preempted_job_saves_is_queued_again_and_ends_with_the_same_adapter(
    cluster, tiny, profile, whole
) -> None:
    cluster.launch(
        "tiny.yaml", "--profile", profile, "--stages", "train", "run.name=preempted", *STEPS
    )
    cluster.wait_for(lambda: cluster.steps("preempted") >= 4, "the fourth step")
    urgent = cluster.call(
        "sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "--wrap", "sleep 1"
    ).stdout.strip()
    states = cluster.ended("preempted")
    log = cluster.log("preempted")
    assert states["train"]["state"] == "COMPLETED", log
    assert urgent and states["train"]["tries"] in (2, 3), (
        log
    )  # Slurm queues a preempted job again once more; that try has nothing to do
    assert re.search(r"stopped at step \d+/400", log) and log.count("resuming checkpoint-") == 1, (
        log
    )
    assert "try=0" in log and "try=1" in log  # one log, appended
    assert cluster.adapter("preempted") == cluster.adapter(whole)


def test_usr2_to_the_batch_shell_of_two_ranks_saves_requeues_and_changes_nothing(
    cluster, tiny, profile
) -> None:
    launch = (
        "tiny.yaml",
        "--profile",
        profile,
        "--stages",
        "train",
        "--accelerate",
        "ddp_cpu",
        "--gpus",
        "2",
    )
    cluster.launch(*launch, "run.name=pair", *STEPS)
    cluster.ended("pair")
    cluster.launch(*launch, "run.name=asked", *STEPS)
    cluster.wait_for(lambda: cluster.steps("asked") >= 4, "the fourth step")
    cluster.call("scancel", "--batch", "--signal=USR2", cluster.jobs("asked")["train"])
    states = cluster.ended("asked")
    log = cluster.log("asked")
    assert (states["train"]["state"], states["train"]["tries"]) == ("COMPLETED", 2), log
    assert re.search(r"stopped at step \d+/400", log) and "back into the queue" in log
    assert cluster.adapter("asked") == cluster.adapter("pair")


def test_the_time_limit_asks_for_a_checkpoint_and_a_job_out_of_requeues_ends_with_75(
    cluster, tiny
) -> None:
    profile = cluster.profile("short", time="00:01:00", signal_lead_s=20, max_requeues=0)
    long = (
        "train.max_steps=100000",
        'train.eval_strategy="no"',
        "train.save_steps=100000",
        "train.logging_steps=10",
    )
    cluster.launch(
        "tiny.yaml",
        "--profile",
        str(profile),
        "--stages",
        "train,report",
        "run.name=limited",
        *long,
    )
    states = cluster.ended("limited")
    assert states["train"]["exit_code"] == 75, cluster.log("limited")
    assert cluster.run_state("limited")["state"] == "preempted"
    assert "launch it again to continue" in cluster.log("limited")
    assert states["report"]["state"] == "CANCELLED"


def test_a_failing_training_keeps_its_exit_code_and_cancels_what_waits_for_it(
    cluster, tiny, profile
) -> None:
    explode = (
        "lora=null",
        "train.learning_rate=1e30",
        "train.lr_scheduler_type=constant",
        "run.name=explodes",
    )
    cluster.launch(
        "tiny.yaml",
        "--profile",
        profile,
        "--accelerate",
        "ddp_cpu",
        "--gpus",
        "2",
        "--stages",
        "train,report",
        *explode,
    )
    states = cluster.ended("explodes")
    assert (states["train"]["state"], states["train"]["exit_code"]) == ("FAILED", 3), cluster.log(
        "explodes"
    )
    assert states["report"]["state"] == "CANCELLED"
    assert "gradient norm is nan" in cluster.recipes("launch", "status", "explodes").stdout
    assert cluster.queue() == []


def test_a_cancelled_training_is_not_queued_again_and_leaves_no_process(
    cluster, tiny, profile
) -> None:
    long = (
        "train.max_steps=100000",
        'train.eval_strategy="no"',
        "train.save_steps=100000",
        "run.name=cancelled",
    )
    cluster.launch("tiny.yaml", "--profile", profile, "--stages", "train,report", *long)
    cluster.wait_for(lambda: cluster.steps("cancelled") >= 2, "the second step")
    second = cluster.recipes(
        "launch", "tiny.yaml", "--profile", profile, "--stages", "train", *long
    )
    assert second.returncode == 2 and "is launched already: train is running" in second.stderr
    done = cluster.recipes("launch", "cancel", "cancelled")
    assert done.returncode == 0 and "cancelled" in done.stdout
    states = cluster.ended("cancelled")
    assert {state["state"] for state in states.values()} == {"CANCELLED"}
    assert states["train"]["tries"] == 1
    assert (
        cluster.run_state("cancelled")["state"] == "preempted"
    )  # it used Slurm's KillWait to save


def test_a_job_whose_node_is_lost_goes_on_elsewhere_and_never_two_tries_train(
    cluster, tiny, profile, whole
) -> None:
    """The node's slurmd ends, its processes live on: Slurm queues the job again while the first try
    still trains.
    """
    cluster.launch("tiny.yaml", "--profile", profile, "--stages", "train", "run.name=lost", *STEPS)
    cluster.wait_for(lambda: cluster.steps("lost") >= 4, "the fourth step")
    node = cluster.call(
        "squeue", "-h", "-o", "%N", "-j", cluster.jobs("lost")["train"]
    ).stdout.strip()
    first = json.loads((cluster.runs / "lost" / "lock.json").read_text())
    pid = (cluster.folder / "slurm" / "run" / f"slurmd-{node}.pid").read_text()
    os.kill(int(pid), signal.SIGKILL)
    try:
        assert (
            cluster.call(
                "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"
            ).returncode
            == 0
        )
        os.kill(first["pid"], 0)  # the first try is not gone with the node's daemon
        states = cluster.ended("lost")
    finally:
        cluster.start_node(node)
    log = cluster.log("lost")
    assert (states["train"]["state"], states["train"]["tries"]) == ("COMPLETED", 2), log
    assert f"is still held by process {first['pid']}" in log and "resuming checkpoint-" in log, log
    assert cluster.run_state("lost")["state"] == "finished"
    assert cluster.adapter("lost") == cluster.adapter(whole)


def test_words_for_srun_start_the_training_and_its_check(cluster, tiny) -> None:
    """As a site with pyxis writes --container-image; --label stands for it here and marks each line
    that a task wrote.
    """
    profile = cluster.profile("labelled", environment={"srun": ["--label"]})
    cluster.launch(
        "tiny.yaml",
        "--profile",
        str(profile),
        "--stages",
        "train",
        "run.name=labelled",
        "train.max_steps=2",
    )
    states = cluster.ended("labelled")
    log = cluster.log("labelled")
    assert states["train"]["state"] == "COMPLETED", log
    assert re.search("^0: .*step 2/2", log, re.M) and re.search(
        "^0: .*verified: these are the trained weights", log, re.M
    ), log


def test_jobs_of_pasted_dry_run_lines_are_known_to_status_and_cancel(
    cluster, tiny, profile
) -> None:
    words = (
        "tiny.yaml",
        "--profile",
        profile,
        "--stages",
        "train,report",
        "run.name=pasted",
        "train.max_steps=100000",
    )
    said = cluster.launch(*words, "--dry-run")
    recipes = f'recipes() {{ "{sys.executable}" -m recipes_lib.cli "$@"; }}'
    assert cluster.call("bash", "-euc", f"{recipes}\n{said}").returncode == 0
    cluster.wait_for(lambda: cluster.steps("pasted") >= 1, "the first step")
    assert [state["state"] for state in cluster.states("pasted").values()] == ["RUNNING", "PENDING"]
    assert cluster.recipes("launch", "cancel", "pasted").returncode == 0
    cluster.wait_for(lambda: not cluster.queue(), "the end of both jobs")
