"""After the submission: what became of the jobs, waiting for their end, cancelling them, their
logs.

`scontrol show job --json` is asked first, sacct where Slurm has forgotten a job, the job's own
files last.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import next_step, say
from recipes_lib.slurm.folder import LaunchFolder, all_launches, launch_folder
from recipes_lib.slurm.submission import is_unreachable, run_slurm, scancel

PENDING, RUNNING = (
    frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"}),
    frozenset({"RUNNING"}),
)
ENDING = frozenset(
    {"COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
)
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
    """One task as it stands. `state` is Slurm's word, or `done`, `failed`, `unknown` where only
    files tell.
    """

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
            return (
                self.reason
                or "Slurm has forgotten it, and it left no exit code: cancelled or killed"
            )
        if self.state in PENDING:
            return _REASONS.get(self.reason, self.reason)
        if self.state == "RUNNING":
            return f"on {self.nodes}" if self.nodes else ""
        if self.state == "FAILED" or self.state == "failed":
            return (
                "exit code"
                f" {self.exit_code}{f'; {self.reason}' if self.reason.startswith('left no log') else ''}"  # noqa: E501
            )
        if self.state == "CANCELLED" and self.reason in ("DependencyNeverSatisfied", "Dependency"):
            return "an earlier stage did not succeed"
        return {
            "TIMEOUT": "reached its time limit",
            "OUT_OF_MEMORY": "needs more memory_gib_per_gpu",
        }.get(self.state, "")


def states_of(folder: LaunchFolder) -> list[TaskState]:
    """Return the state of every task of a submission, in order."""
    states: list[TaskState] = []
    jobs = folder.read_jobs()
    up = bool(jobs) and controller_answers()
    for job in jobs:
        names = job["tasks"] or [""]
        labels = (
            [f"{job['label']}.{index}" for index in range(len(names))]
            if len(names) > 1
            else [job["label"]]
        )
        known, answered = _from_scontrol(job["id"]) if up else ({}, False)
        known = known or _from_sacct(job["id"])
        for index, (label, what) in enumerate(zip(labels, names, strict=True)):
            found = known.get(index if len(names) > 1 else None) or known.get("waiting")
            states.append(
                _task(folder, label, job["id"], what, found, "" if answered else _NO_ANSWER)
            )
    return states


def _task(
    folder: LaunchFolder,
    label: str,
    job: str,
    what: str,
    found: Mapping[str, Any] | None,
    reason: str,
) -> TaskState:
    """Return the state of one task; without Slurm's word its own exit code, which the job writes
    last, is all there is.

    Args:
        reason: why Slurm's word is missing.
    """
    code = folder.exit_code(label)
    if found is None:
        state = "unknown" if code is None else "done" if code == 0 else "failed"
        return TaskState(label, job, state, what, reason, exit_code=code, source="files")
    values = {**found, "exit_code": code if code is not None else found["exit_code"]}
    if found["state"] == "FAILED" and code is None and not folder.log(label).is_file():
        values["reason"] = (
            f"left no log: does its node see {folder.path}? (directories.runs of the profile)"
        )
    return TaskState(label, job, what=what, **values)


def controller_answers() -> bool:
    """Whether Slurm's controller is up: where it is not, `scontrol --json` waits, shows no jobs and
    exits 0, as for a forgotten job.
    """
    try:
        return (
            re.search(r"\bUP\b", run_slurm(["scontrol", "ping"], timeout_s=30).stdout) is not None
        )
    except EnvironmentFault:
        return False


def _from_scontrol(job: str) -> tuple[dict[Any, dict[str, Any]], bool]:
    """Return {task number, None for a plain job, "waiting" for array tasks that did not start:
    facts}, and whether Slurm answered.
    """
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
            "state": next(
                (word for word in states if word in ENDING and states[0] not in ACTIVE), states[0]
            ),
            "reason": str(record.get("state_reason") or ""),
            "nodes": str(record.get("nodes") or ""),
            "tries": int(record.get("restart_cnt") or 0) + 1,
            "exit_code": _exit_code(record.get("exit_code")),
        }
    return result, True


def _from_sacct(job: str) -> dict[Any, dict[str, Any]]:
    """Return the same from the accounting database, where the site has one."""
    try:
        done = run_slurm(
            ["sacct", "-n", "-P", "-X", "-D", "-j", job, "--format=JobID,State,ExitCode,NodeList"],
            timeout_s=30,
        )
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


POLL_S = 2.0
ASK_SINFO = "is this the login node, and is the controller up? sinfo"
COLUMNS = ("job", "stage", "state", "tries", "")


def show_status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = [_folder(name) for name in names] or all_launches()
    if as_json:
        say(
            json.dumps(
                {
                    folder.name: [dataclasses.asdict(state) for state in states_of(folder)]
                    for folder in folders
                },
                indent=2,
            )
        )
        return ExitCode.DONE
    if not folders:
        say(f"nothing was launched from {runs_root()}")
        next_step("recipes launch RECIPE --profile P --dry-run")
        return ExitCode.DONE
    last: list[TaskState] = []
    for folder in folders:
        last = states_of(folder)
        say(f"{folder.name}{_training_state(folder)}")
        rows = [COLUMNS, *(_row(state) for state in last)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for row in rows:
            say(
                "  "
                + "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
        for state in last:
            error = None if state.active or state.succeeded else folder.first_error(state.label)
            if error:
                say(f"  {state.label}: {error}")
    _next(folders[-1], last)
    return ExitCode.DONE


def _next(folder: LaunchFolder, states: Sequence[TaskState]) -> None:
    """Name the command that follows: the log of what failed where there is one, else the logs of
    what runs, else the run.
    """
    failed = [state for state in states if not (state.active or state.succeeded or state.unheard)]
    told = next((state for state in failed if folder.log(state.label).is_file()), None)
    if any(state.unheard for state in states):
        next_step(f"recipes launch status {folder.name}")
    elif told:
        next_step(f"recipes launch logs {folder.name} --stage {told.label}")
    elif any(folder.path.glob("*.log")):
        next_step(
            f"recipes launch logs {folder.name}"
            if any(state.active for state in states)
            else f"recipes status {folder.name}"
        )
    elif failed:
        next_step(
            "recipes launch RECIPE|STUDY --profile P   (the same command as before: it continues)"
        )
    else:
        next_step(f"recipes launch status {folder.name}")


def _row(state: TaskState) -> tuple[str, ...]:
    what = f" ({state.what})" if "." in state.label and state.what else ""
    return (
        state.job,
        f"{state.label}{what}",
        state.state.lower(),
        str(state.tries),
        state.explanation(),
    )


def _training_state(folder: LaunchFolder) -> str:
    """Return what run.json says beside the jobs: a job that runs may be starting, training or
    saving.
    """
    run = RunDirectory(folder.name, folder.path.parents[1])
    if not run.exists():
        return ""
    state = run.read_state()
    error = f"; {str(state['error']).splitlines()[0]}" if state.get("error") else ""
    return f": run {state['state']}{error}"


def wait(folder: LaunchFolder) -> int:
    """Wait for the end of a chain, say what changes, and return 0 or the exit code of the first job
    that failed.
    """
    before: dict[str, str] = {}
    while True:
        states = states_of(folder)
        for state in states:
            if before.get(state.label) != state.state:
                say(
                    f"{state.label}:"
                    f" {state.state.lower()}{f' - {state.explanation()}' if state.explanation() else ''}"  # noqa: E501
                )
                before[state.label] = state.state
        if not any(state.active or state.unheard for state in states):
            break
        time.sleep(POLL_S)
    failed = [state for state in states if not state.succeeded]
    if not failed:
        say(f"{folder.name}: every job succeeded")
        return ExitCode.DONE
    cause = next((state for state in failed if state.exit_code), failed[0])
    for line in _tail(folder, cause.label, 15):
        say(f"  {line}")
    next_step(f"recipes launch logs {folder.name} --stage {cause.label}")
    return cause.exit_code or ExitCode.FAILED


def cancel(names: Sequence[str]) -> int:
    """Cancel every job of the launches named.

    Raises:
        EnvironmentFault: Slurm does not say what is queued.
    """
    if not names:
        raise RecipeError("recipes launch cancel: name a run or study", f"launched: {_known()}")
    for name in names:
        states = states_of(_folder(name))
        if any(state.unheard for state in states):
            raise EnvironmentFault(
                f"{name}: Slurm gives no answer, so nothing is cancelled", ASK_SINFO
            )
        ids = active_ids(states)
        scancel(ids)
        say(
            f"{name}: cancelled {', '.join(ids)}"
            if ids
            else f"{name}: nothing was queued or running"
        )
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def show_logs(names: Sequence[str], stage: str | None, lines: int) -> int:
    """Print the last lines of each stage's log, after the first error where there is one."""
    if len(names) != 1:
        raise RecipeError("recipes launch logs: name one run or study", f"launched: {_known()}")
    folder = _folder(names[0])
    logs = sorted(folder.path.glob("*.log"), key=lambda path: path.stat().st_mtime)
    chosen = [
        path
        for path in logs
        if stage is None or path.stem == stage or path.stem.startswith(f"{stage}.")
    ]
    if not chosen:
        there = ", ".join(path.stem for path in logs)
        raise RecipeError(
            f"'{names[0]}' has no log{f' of {stage}' if stage else ' yet'}",
            f"logs: {there or 'none; has a job started?'}",
        )
    for path in chosen:
        say(f"==> {shown_path(path)}")
        error = folder.first_error(path.stem)
        if error:
            say(f"first error: {error}")
        for line in _tail(folder, path.stem, lines):
            say(line)
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def refuse_if_active(folder: LaunchFolder) -> None:
    """Refuse to launch what is queued or running already.

    Raises:
        RecipeError: it is.
        EnvironmentFault: Slurm does not say.
    """
    known = states_of(folder)
    if any(state.unheard for state in known):
        raise EnvironmentFault(
            f"'{folder.name}' was launched before and may still be queued: Slurm gives no answer",
            ASK_SINFO,
        )
    states = [state for state in known if state.active]
    if states:
        jobs = ", ".join(
            f"{state.label} is {state.state.lower()} (job {state.job})" for state in states
        )
        raise RecipeError(
            f"'{folder.name}' is launched already: {jobs}",
            f"wait for it, or: recipes launch cancel {folder.name}",
        )


def _folder(name: str) -> LaunchFolder:
    """Return what was launched under a name.

    Raises:
        RecipeError: nothing was.
    """
    folder = launch_folder(name.rstrip("/").rpartition("/")[2])
    if not folder.read_jobs():
        raise RecipeError(
            f"nothing was launched as '{name}' in {runs_root()}", f"launched: {_known()}"
        )
    return folder


def _known() -> str:
    return ", ".join(folder.name for folder in all_launches()) or "nothing yet"


def _tail(folder: LaunchFolder, label: str, lines: int) -> list[str]:
    path = folder.log(label)
    return (
        path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        if path.is_file()
        else []
    )
