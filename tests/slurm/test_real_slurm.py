"""Jobs of a real Slurm: four made-up nodes of this machine (launch/sandbox.sh)."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from tests.study.study_files import write_tiny_study

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
# Some 15 seconds: long enough to be preempted by a scheduler that looks every few seconds.
STEPS = [f"train.{key}" for key in ("max_steps=400", "save_steps=100", "eval_steps=100")]
STEPS += ["lora.lora_dropout=0.3"]
ENDLESS = ("train.max_steps=100000", "train.eval_strategy='no'", "train.save_steps=100000")


@pytest.fixture(scope="module")
def profile(cluster) -> str:
    return str(cluster.profile())


@pytest.fixture(scope="module")
def whole(cluster, tiny, forks) -> str:
    """A run of one process that nothing disturbs, without Slurm."""
    train_without_slurm(cluster, tiny, forks, "run.name=whole", *STEPS)
    return "whole"


def train_without_slurm(cluster, tiny, forks, *words: str) -> None:
    code, said = forks.start([tiny, *words], RECIPES_RUNS_ROOT=str(cluster.runs)).wait()
    assert code == 0, said


def test_a_recipe_is_trained_judged_by_a_server_of_the_job_and_reported(
    cluster, tiny, tiny_model_dir
) -> None:
    write_tiny_study(cluster.work / "served", tiny_model_dir, questions=3)
    judge = cluster.work / "served" / "judge.yaml"
    served = {"model": "org/judge", "engine": "openai", "base_url": "http://127.0.0.1:8000/v1"}
    values = {**yaml.safe_load(judge.read_text())["judge"], **served, "mode": "generate"}
    # tokens of a server are counted by a bound: the tiny judge's own context would cut every prompt
    values["max_context_tokens"] = 4096
    judge.write_text(yaml.safe_dump({"judge": values}))
    vllm = cluster.work / "vllm"
    server = PROJECT / "tests/launch/served_judge.py"
    vllm.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{server}" "$@"\n')
    vllm.chmod(0o755)
    profile = cluster.profile("served", vllm=str(vllm))
    words = ("--evals", "served/alpaca_eval.yaml", "run.name=judged", "train.max_steps=2")
    cluster.launch("tiny.yaml", "--profile", str(profile), *words)
    states = cluster.ended("judged")
    logs = {label: cluster.log("judged", label) for label in states}
    assert {state["state"] for state in states.values()} == {"done"}, logs
    assert "world size 1" in logs["train"] and "not checked" not in logs["train"]
    evaluated = next(label for label in states if label.startswith("eval-"))
    assert "judge: answers after" in logs[evaluated]
    judge_log = cluster.runs / "judged" / "slurm" / f"{evaluated}.judge.log"
    assert "serve org/judge" in judge_log.read_text()
    assert (cluster.runs / "judged" / "report.html").is_file()


def test_a_job_that_was_asked_to_save_and_one_preempted_end_with_the_same_adapter(
    cluster, tiny, profile, whole
) -> None:
    """One job: after USR2, which Slurm sends before the time limit, its script queues it again;
    then Slurm does.
    """

    def wait_for_step(step: int, try_number: int) -> None:
        def is_there() -> bool:
            waiting, log = cluster.waiting("disturbed"), cluster.log("disturbed")
            assert waiting, log
            return f"try={try_number}" in log and cluster.steps("disturbed") >= step

        cluster.wait_for(is_there, f"step {step} of try {try_number}")

    words = ("tiny.yaml", "--profile", profile, "--stages", "train", "run.name=disturbed", *STEPS)
    cluster.launch(*words)
    wait_for_step(4, 0)
    cluster.call("scancel", "--batch", "--signal=USR2", cluster.jobs("disturbed")["train"])
    wait_for_step(cluster.steps("disturbed") + 30, 1)
    cluster.call("sbatch", "-p", "urgent", "-N4", "--exclusive", "--wrap", "sleep 1")
    states = cluster.ended("disturbed")
    log = cluster.log("disturbed")
    assert states["train"]["state"] == "done" and "saved; requeueing" in log, log
    assert len(re.findall(r"stopped at step \d+/400", log)) == 2, log
    assert log.count("resuming checkpoint-") == 2 and "try=2" in log, log  # one log, appended
    assert cluster.adapter("disturbed") == cluster.adapter(whole)


@pytest.mark.nightly
def test_before_the_time_limit_slurm_sends_usr2_and_without_a_requeue_the_code_is_75(cluster, tiny):
    """In two minutes; what the script does then is tested with every commit (test_job_script)."""
    short = cluster.profile("short", sbatch={"time": "00:02:00"}, signal_lead_s=30, max_requeues=0)
    words = ("tiny.yaml", "--profile", str(short), "--stages", "train", "run.name=limited")
    cluster.launch(*words, *ENDLESS)
    states = cluster.ended("limited")
    assert states["train"]["exit_code"] == 75, cluster.log("limited")
    assert cluster.run_state("limited")["state"] == "stopped"


def test_a_cancelled_training_is_not_queued_again_and_leaves_no_process(cluster, tiny, profile):
    words = ("tiny.yaml", "--profile", profile, "run.name=cancelled", *ENDLESS)
    evals = ("--evals", str(PROJECT / "evals/quickstart/house_style.yaml"))
    cluster.launch(*words, *evals)
    cluster.wait_for(lambda: cluster.steps("cancelled") >= 2, "the second step")
    second = cluster.recipes("launch", *words, *evals)
    assert second.returncode == 2 and "is already launched: train is running" in second.stderr
    assert "cancelled" in cluster.recipes("launch", "cancel", "cancelled").stdout
    states = cluster.ended("cancelled")
    assert not any(state["active"] or state["state"] == "done" for state in states.values())
    assert cluster.run_state("cancelled")["state"] == "stopped"  # it used Slurm's KillWait
    assert cluster.queue() == []


def test_an_array_with_a_failing_arm_evaluates_and_reports_the_others(cluster, tiny_model_dir):
    study = write_tiny_study(cluster.work / "study", tiny_model_dir, steps=4, questions=4)
    text = study.read_text().partition("evals:")[0] + "evals: [alpaca_eval.yaml]\n"
    broken = "r16: {recipe: r8.yaml, overrides: [train.adam_epsilon=0]}"  # 0 / 0 in its first step
    study.write_text(text.replace("  r8: r8.yaml", f"  r8: r8.yaml\n  {broken}"))
    profile = cluster.profile("study", max_concurrent_arms=2)
    said = cluster.launch(str(study), "--profile", str(profile))
    assert re.search(r"train: job \d+ \(3 arms\)", said) and "eval: job" in said
    states = cluster.ended("tiny", seconds=500)
    logs = {label: cluster.log("tiny", label) for label in states}
    found = {label: state["state"] for label, state in states.items()}
    failed = {"train.2": "failed", "eval": "failed"}
    assert found == {"train.0": "done", "train.1": "done", **failed}, logs
    assert states["train.2"]["exit_code"] == 3, logs
    assert "r16 (exit code 3): gradient norm is " in logs["eval"]
    assert "gradient norm is " in states["train.2"]["error"], states
    report = cluster.runs / "tiny" / "report"
    assert (report / "report.html").is_file() and json.loads((report / "numbers.json").read_text())
    status = cluster.recipes("study", "status", str(study)).stdout
    assert "tiny--r16" in status and "tiny--r8" not in status


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_study_with_looks_ends_at_its_first_or_goes_on_to_its_second(
    cluster, tiny_model_dir, goes_on: bool
) -> None:
    """Two arms within a wide margin need no third seed; without a verdict they do."""
    name = "goes-on" if goes_on else "ends"
    study = write_tiny_study(cluster.work / name, tiny_model_dir, steps=4)
    loss = "suite: {name: heldout_loss}\ndata: {questions: validation}\n"
    schema = "# yaml-language-server: $schema=eval.schema.json\n"
    study.with_name("loss.yaml").write_text(schema + loss)
    arms = "  r4: r4.yaml\n  r8: {recipe: r4.yaml, overrides: [train.learning_rate=1.0e-3]}\n"
    text = study.read_text().partition("factors:")[0]
    text += f"factors: {{rate: [train.learning_rate]}}\narms:\n{arms}include_base: false\n"
    text += "seeds: [1, 2, 3]\nlooks: [2, 3]\nevals: [loss.yaml]\n"
    # a loss on fewer than 50 rows has no verdict, so more seeds are trained
    held_out = 0.5 if goes_on else 0.8
    text += f"overrides: [data.max_examples=null, data.split.validation={held_out}]\n"
    if not goes_on:
        text += "margins: {loss: 50}\n"
    file = study.with_name(f"{name}.yaml")
    file.write_text(text)
    cluster.launch(str(file), "--profile", str(cluster.profile("looks")))
    states = cluster.ended(name, seconds=500)
    logs = {label: cluster.log(name, label) for label in states}
    found = {label: state["state"] for label, state in states.items()}
    assert found["eval-look1"] == "done", logs
    folder = cluster.runs / name
    noted = json.loads((folder / "design.json").read_text())["shown"]
    if goes_on:
        assert set(found.values()) == {"done"}, (found, logs)
        assert [record["stops"] for record in noted] == [False, True]
    else:
        assert found["look1"] == "stopped" and found["eval-look2"] == "cancelled", (found, logs)
        assert [record["stops"] for record in noted] == [True]
        assert "Stopped at look 1 of 2" in (folder / "report" / "report.md").read_text()


def test_two_nodes_of_two_processes_train_as_one_process(cluster, tiny, profile, forks):
    from safetensors.torch import load

    plain = ("train.max_steps=6", "train.per_device_train_batch_size=2")
    launch = ("tiny.yaml", "--profile", profile, "--stages", "train", *plain)
    size = ("--accelerate", "ddp_cpu", "--nodes", "2", "--gpus", "2")
    cluster.launch(*launch, *size, "run.name=four")
    train_without_slurm(cluster, tiny, forks, *plain, "run.name=alone")
    assert cluster.ended("four")["train"]["state"] == "done", cluster.log("four")
    log = cluster.log("four")
    assert "2 node(s) x 2 process(es)" in log and "DDP, world size 4" in log
    alone, four = load(cluster.adapter("alone")), load(cluster.adapter("four"))
    assert max(float((alone[name] - four[name]).abs().max()) for name in alone) < 1e-4


def test_when_a_node_is_lost_its_job_goes_on_elsewhere_with_the_same_adapter(
    cluster, tiny, profile, whole
) -> None:
    """What the node ran goes on at first, as behind a broken network: the later try waits for it.
    The node stays away, so this is the last test here.
    """
    words = ("tiny.yaml", "--profile", profile, "--stages", "train", "run.name=lost", *STEPS)
    cluster.launch(*words)
    cluster.wait_for(lambda: cluster.steps("lost") >= 4, "the fourth step")
    node = cluster.states("lost")["train"]["reason"]
    daemon = (cluster.folder / "slurm" / "run" / f"slurmd-{node}.pid").read_text()
    os.kill(int(daemon), signal.SIGKILL)
    cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    states = cluster.ended("lost")
    log = cluster.log("lost")
    assert states["train"]["state"] == "done" and "try=1" in log, log
    assert cluster.adapter("lost") == cluster.adapter(whole)
