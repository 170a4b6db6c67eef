"""What became of submitted jobs: `scontrol show job --json` first, sacct where Slurm has forgotten the job, the job's own files last."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.errors import EnvironmentFault
from recipes_lib.launching.folder import LaunchFolder
from recipes_lib.launching.submission import is_unreachable, run_slurm

PENDING, RUNNING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"}), frozenset({"RUNNING"})
ENDING = frozenset({"COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"})
ACTIVE = PENDING | RUNNING | ENDING
# What a reason of Slurm means to somebody who waits.
_REASONS = {
    "None": "",
    "Dependency": "waits for an earlier stage",
    "DependencyNeverSatisfied": "an earlier stage failed, so it will never start",
    "Priority": "others are before it in the queue",
    "Resources": "waits for free nodes",
    "BeginTime": "queued again; Slurm waits two minutes before it starts a requeued job",
    "JobArrayTaskLimit": "waits for another arm (max_concurrent_arms)",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as your QOS allows",
    "AssocGrpCpuLimit": "your account is at its limit",
    "AssocGrpGRES": "your account is at its limit of GPUs",
    "ReqNodeNotAvail": "the nodes it needs are down or reserved",
    "PartitionTimeLimit": "its time limit is longer than the partition's: it will never start",
    "JobHeldUser": "held; release it: scontrol release",
    "JobHeldAdmin": "held by an administrator",
}
_NO_ANSWER = "Slurm gives no answer"


@dataclass(frozen=True)
class TaskState:
    """One task as it stands. `state` is Slurm's word, or `done`, `failed`, `unknown` where only files tell."""

    label: str
    job: str
    state: str
    what: str = ""
    reason: str = ""
    nodes: str = ""
    tries: int = 1
    exit_code: int | None = None
    source: str = "scontrol"

    @property
    def active(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ACTIVE

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.state in ("COMPLETED", "done")

    @property
    def unheard(self) -> bool:
        """Whether it may be queued or running, and Slurm does not say."""
        return self.state == "unknown" and self.reason == _NO_ANSWER

    def explanation(self) -> str:
        """Return what the state means."""
        if self.state == "unknown":
            return self.reason or "Slurm has forgotten it, and it left no exit code: cancelled or killed"
        if self.state in PENDING:
            return _REASONS.get(self.reason, self.reason)
        if self.state == "RUNNING":
            return f"on {self.nodes}" if self.nodes else ""
        if self.state == "FAILED" or self.state == "failed":
            return f"exit code {self.exit_code}{f'; {self.reason}' if self.reason.startswith('left no log') else ''}"
        if self.state == "CANCELLED" and self.reason in ("DependencyNeverSatisfied", "Dependency"):
            return "an earlier stage did not succeed"
        return {"TIMEOUT": "reached its time limit", "OUT_OF_MEMORY": "needs more memory_gib_per_gpu"}.get(self.state, "")


def states_of(folder: LaunchFolder) -> list[TaskState]:
    """Return the state of every task of a submission, in order."""
    states: list[TaskState] = []
    jobs = folder.read_jobs()
    up = bool(jobs) and controller_answers()
    for job in jobs:
        names = job["tasks"] or [""]
        labels = [f"{job['label']}.{index}" for index in range(len(names))] if len(names) > 1 else [job["label"]]
        known, answered = _from_scontrol(job["id"]) if up else ({}, False)
        known = known or _from_sacct(job["id"])
        for index, (label, what) in enumerate(zip(labels, names, strict=True)):
            found = known.get(index if len(names) > 1 else None) or known.get("waiting")
            states.append(_task(folder, label, job["id"], what, found, "" if answered else _NO_ANSWER))
    return states


def _task(folder: LaunchFolder, label: str, job: str, what: str, found: Mapping[str, Any] | None, reason: str) -> TaskState:
    """Return the state of one task; without Slurm's word its own exit code, which the job writes last, is all there is.

    Args:
        reason: why Slurm's word is missing.
    """
    code = folder.exit_code(label)
    if found is None:
        state = "unknown" if code is None else "done" if code == 0 else "failed"
        return TaskState(label, job, state, what, reason, exit_code=code, source="files")
    values = {**found, "exit_code": code if code is not None else found["exit_code"]}
    if found["state"] == "FAILED" and code is None and not folder.log(label).is_file():
        values["reason"] = f"left no log: does its node see {folder.path}? (directories.runs of the profile)"
    return TaskState(label, job, what=what, **values)


def controller_answers() -> bool:
    """Whether Slurm's controller is up: where it is not, `scontrol --json` waits, shows no jobs and exits 0, as for a forgotten job."""
    try:
        return re.search(r"\bUP\b", run_slurm(["scontrol", "ping"], timeout_s=30).stdout) is not None
    except EnvironmentFault:
        return False


def _from_scontrol(job: str) -> tuple[dict[Any, dict[str, Any]], bool]:
    """Return {task number, None for a plain job, "waiting" for array tasks that did not start: facts}, and whether Slurm answered."""
    try:
        done = run_slurm(["scontrol", "show", "job", job, "--json"], timeout_s=30)
        if done.returncode:
            return {}, not is_unreachable(done.stderr)
        records = json.loads(done.stdout)["jobs"]
    except EnvironmentFault:
        return {}, False
    except (ValueError, KeyError, TypeError):
        return {}, True
    result: dict[Any, dict[str, Any]] = {}
    for record in records:
        task = record.get("array_task_id")
        array = _number(record.get("array_job_id"))
        number = _number(task) if _is_set(task) else None
        key: Any = number if array and number is not None else "waiting" if array else None
        states = record["job_state"]
        states = [states] if isinstance(states, str) else list(states)
        result[key] = {
            "state": next((word for word in states if word in ENDING and states[0] not in ACTIVE), states[0]),
            "reason": str(record.get("state_reason") or ""),
            "nodes": str(record.get("nodes") or ""),
            "tries": int(record.get("restart_cnt") or 0) + 1,
            "exit_code": _exit_code(record.get("exit_code")),
        }
    return result, True


def _from_sacct(job: str) -> dict[Any, dict[str, Any]]:
    """Return the same from the accounting database, where the site has one."""
    try:
        done = run_slurm(["sacct", "-n", "-P", "-X", "-D", "-j", job, "--format=JobID,State,ExitCode,NodeList"], timeout_s=30)
    except EnvironmentFault:
        return {}
    result: dict[Any, dict[str, Any]] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        fields = line.split("|")
        match = re.fullmatch(r"\d+(?:_(\d+|\[.*\]))?", fields[0])
        if len(fields) != 4 or not match:
            continue
        task: Any = None if match[1] is None else int(match[1]) if match[1].isdigit() else "waiting"
        before = result.get(task)
        result[task] = {
            "state": fields[1].split()[0],  # CANCELLED by 1000
            "reason": "",
            "nodes": "" if fields[3] == "None assigned" else fields[3],
            "tries": before["tries"] + 1 if before else 1,  # -D: one line for each time it ran
            "exit_code": int(fields[2].partition(":")[0] or 0),
            "source": "sacct",
        }
    return result


def _is_set(value: Any) -> bool:
    return bool(value.get("set")) if isinstance(value, dict) else value not in (None, "")


def _number(value: Any) -> int:
    """Return a number as either of Slurm's JSON formats writes it."""
    return int(value.get("number") or 0) if isinstance(value, dict) else int(value or 0)


def _exit_code(value: Any) -> int | None:
    if isinstance(value, dict):
        return _number(value.get("return_code"))
    return None if value is None else int(value) >> 8


def active_ids(states: Sequence[TaskState]) -> list[str]:
    """Return the ids of jobs that are queued or running."""
    return list(dict.fromkeys(state.job for state in states if state.active))
