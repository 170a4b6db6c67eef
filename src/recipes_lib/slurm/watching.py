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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import aligned, next_step, say, say_json
from recipes_lib.slurm.jobs import jobs_folder, task_labels
from recipes_lib.slurm.submission import (
    ASK_SINFO,
    LaunchFolder,
    all_launches,
    is_unreachable,
    run_slurm,
    scancel,
)

ASK_S = 30
POLL_S = 2.0
PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"}
ENDING = {
    *("COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED"),
    *("STAGE_OUT", "SIGNALING", "RESIZING"),
}
ACTIVE = PENDING | ENDING | {"RUNNING"}
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


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """One task as it stands. `state` is Slurm's word, or `done`, `failed`, `unknown` where only
    files tell.
    """

    label: str = ""
    job: str = ""
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
        if self.state in PENDING:
            return _REASONS.get(self.reason, self.reason)
        if self.state in ("FAILED", "failed"):
            more = f"; {self.reason}" if self.reason.startswith("left no log") else ""
            return f"exit code {self.exit_code}{more}"
        never = self.reason in ("DependencyNeverSatisfied", "Dependency")
        forgotten = "Slurm has forgotten it, and it left no exit code: cancelled or killed"
        return {
            "unknown": self.reason or forgotten,
            "RUNNING": self.nodes and f"on {self.nodes}",
            "CANCELLED": "an earlier stage did not succeed" if never else "",
            "TIMEOUT": "reached its time limit",
            "OUT_OF_MEMORY": "needs more memory_gib_per_gpu",
        }.get(self.state, "")


# ---- Asking ----

# What Slurm says of a job by the number of a task, "waiting" for those of an array that did not
# start, None for a plain job.
_Known = dict[int | str | None, TaskState]


def states_of(folder: LaunchFolder) -> list[TaskState]:
    """Return the state of every task of a submission, in order."""
    states: list[TaskState] = []
    jobs = folder.read_jobs()
    up = bool(jobs) and controller_answers()
    for job in jobs:
        names = job.tasks or ("",)
        known, answered = _from_scontrol(job.id) if up else ({}, False)
        known = known or _from_sacct(job.id)
        for index, label in enumerate(task_labels(job.label, len(names))):
            found = known.get(index if len(names) > 1 else None) or known.get("waiting")
            # The job writes its own exit code last; without Slurm's word it is all there is.
            code = folder.exit_code(label)
            if found is None:
                state = "unknown" if code is None else "done" if code == 0 else "failed"
                reason = "" if answered else _NO_ANSWER
                found = TaskState(state=state, reason=reason, source="files")
            elif found.state == "FAILED" and code is None and not folder.log(label).is_file():
                reason = f"does its node see {folder.path}? (directories.runs of the profile)"
                found = dataclasses.replace(found, reason=f"left no log: {reason}")
            code = found.exit_code if code is None else code
            what = names[index]
            states.append(
                dataclasses.replace(found, label=label, job=job.id, what=what, exit_code=code)
            )
    return states


def controller_answers() -> bool:
    """Whether Slurm's controller is up: where it is not, `scontrol --json` waits, shows no jobs and
    exits 0, as for a forgotten job.
    """
    try:
        said = run_slurm(["scontrol", "ping"], timeout_s=ASK_S).stdout
    except EnvironmentFault:
        return False
    return re.search(r"\bUP\b", said) is not None


def _from_scontrol(job: str) -> tuple[_Known, bool]:
    """Return what Slurm still knows of a job, and whether it answered."""
    try:
        done = run_slurm(["scontrol", "show", "job", job, "--json"], timeout_s=ASK_S)
        if done.returncode:
            return {}, not is_unreachable(done.stderr)
        records = json.loads(done.stdout)["jobs"]
    except EnvironmentFault:
        return {}, False
    except (ValueError, KeyError, TypeError):
        return {}, True
    known: _Known = {}
    for record in records:
        task = record.get("array_task_id")
        is_task = task.get("set") if isinstance(task, dict) else task not in (None, "")
        in_array = _number(record.get("array_job_id"))
        states = record["job_state"]
        states = [states] if isinstance(states, str) else list(states)
        ending = [word for word in states if word in ENDING and states[0] not in ACTIVE]
        code = record.get("exit_code")
        if isinstance(code, dict):
            code = _number(code.get("return_code"))
        elif code is not None:
            code = int(code) >> 8
        known[None if not in_array else _number(task) if is_task else "waiting"] = TaskState(
            state=(ending or states)[0],
            reason=str(record.get("state_reason") or ""),
            nodes=str(record.get("nodes") or ""),
            tries=int(record.get("restart_cnt") or 0) + 1,
            exit_code=code,
        )
    return known, True


def _from_sacct(job: str) -> _Known:
    """Return the same from the accounting database, where the site has one."""
    columns = "--format=JobID,State,ExitCode,NodeList"
    try:
        done = run_slurm(["sacct", "-n", "-P", "-X", "-D", "-j", job, columns], timeout_s=ASK_S)
    except EnvironmentFault:
        return {}
    known: _Known = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        match = re.fullmatch(r"\d+(?:_(\d+|\[.*\]))?\|([^|]*)\|([^|]*)\|([^|]*)", line)
        if not match:
            continue
        number, state, code, nodes = match.groups()
        task = None if number is None else int(number) if number.isdigit() else "waiting"
        known[task] = TaskState(
            state=state.split()[0],  # CANCELLED by 1000
            nodes="" if nodes == "None assigned" else nodes,
            tries=known[task].tries + 1 if task in known else 1,  # -D: a line for each try
            exit_code=int(code.partition(":")[0] or 0),
            source="sacct",
        )
    return known


def _number(value: Any) -> int:
    """Return a number as either of Slurm's JSON formats writes it."""
    return int((value.get("number") if isinstance(value, dict) else value) or 0)


# ---- Showing ----


def show_status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = [_folder(name) for name in names] or all_launches()
    known = {folder: states_of(folder) for folder in folders}
    if as_json:
        rows = {
            folder.name: list(map(dataclasses.asdict, states)) for folder, states in known.items()
        }
        return say_json(rows)
    if not folders:
        say(f"nothing was launched from {runs_root()}")
        next_step("recipes launch RECIPE --profile P --dry-run")
        return ExitCode.DONE
    for folder, states in known.items():
        say(f"{folder.name}{_training_state(folder)}")
        for line in aligned([("job", "stage", "state", "tries", ""), *map(_row, states)]):
            say(f"  {line}")
        for state in states:
            if not (state.active or state.succeeded) and (error := folder.first_error(state.label)):
                say(f"  {state.label}: {error}")
    next_step(_after_status(folders[-1], known[folders[-1]]))
    return ExitCode.DONE


def _after_status(folder: LaunchFolder, states: Sequence[TaskState]) -> str:
    """Return the command that follows: the log of what failed where there is one, else the logs of
    what runs, else the run.
    """
    failed = [state for state in states if not (state.active or state.succeeded or state.unheard)]
    told = next((state for state in failed if folder.log(state.label).is_file()), None)
    if any(state.unheard for state in states):
        return f"recipes launch status {folder.name}"
    if told:
        return f"recipes launch logs {folder.name} --stage {told.label}"
    if any(folder.path.glob("*.log")):
        active = any(state.active for state in states)
        return f"recipes launch logs {folder.name}" if active else f"recipes status {folder.name}"
    if failed:
        return (
            "recipes launch RECIPE|STUDY --profile P   (the same command as before: it continues)"
        )
    return f"recipes launch status {folder.name}"


def _row(state: TaskState) -> tuple[str, ...]:
    what = f" ({state.what})" if "." in state.label and state.what else ""
    shown = (f"{state.label}{what}", state.state.lower(), str(state.tries))
    return (state.job, *shown, state.explanation())


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
                why = state.explanation()
                say(f"{state.label}: {state.state.lower()}{f' - {why}' if why else ''}")
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
        raise RecipeError("recipes launch cancel: name a run or study", f"launched: {_launched()}")
    for name in names:
        states = states_of(_folder(name))
        if any(state.unheard for state in states):
            what = f"{name}: Slurm gives no answer, so nothing is cancelled"
            raise EnvironmentFault(what, ASK_SINFO)
        ids = list(dict.fromkeys(state.job for state in states if state.active))
        scancel(ids)
        say(
            f"{name}: "
            + (f"cancelled {', '.join(ids)}" if ids else "nothing was queued or running")
        )
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def show_logs(names: Sequence[str], stage: str | None, lines: int) -> int:
    """Print the last lines of each stage's log, after the first error where there is one."""
    if len(names) != 1:
        raise RecipeError("recipes launch logs: name one run or study", f"launched: {_launched()}")
    folder = _folder(names[0])
    logs = sorted(folder.path.glob("*.log"), key=lambda path: path.stat().st_mtime)
    chosen = [path for path in logs if stage is None or f"{path.stem}.".startswith(f"{stage}.")]
    if not chosen:
        there = ", ".join(path.stem for path in logs)
        raise RecipeError(
            f"'{names[0]}' has no log{f' of {stage}' if stage else ' yet'}",
            f"logs: {there or 'none; has a job started?'}",
        )
    for path in chosen:
        say(f"==> {shown_path(path)}")
        if error := folder.first_error(path.stem):
            say(f"first error: {error}")
        for line in _tail(folder, path.stem, lines):
            say(line)
    next_step(f"recipes launch status {names[0]}")
    return ExitCode.DONE


def goes_on(folder: LaunchFolder) -> bool:
    """Whether a job is queued or running, or may be, where Slurm does not say."""
    return any(state.active or state.unheard for state in states_of(folder))


def refuse_if_active(folder: LaunchFolder) -> None:
    """Refuse to launch what is queued or running already.

    Raises:
        RecipeError: it is.
        EnvironmentFault: Slurm does not say.
    """
    states = states_of(folder)
    if any(state.unheard for state in states):
        raise EnvironmentFault(
            f"'{folder.name}' was launched before and may still be queued: Slurm gives no answer",
            ASK_SINFO,
        )
    active = [state for state in states if state.active]
    if active:
        jobs = (f"{state.label} is {state.state.lower()} (job {state.job})" for state in active)
        raise RecipeError(
            f"'{folder.name}' is launched already: {', '.join(jobs)}",
            f"wait for it, or: recipes launch cancel {folder.name}",
        )


def _folder(name: str) -> LaunchFolder:
    """Return what was launched under a name."""
    folder = LaunchFolder(jobs_folder(name.rstrip("/").rpartition("/")[2]))
    if not folder.read_jobs():
        what = f"nothing was launched as '{name}' in {runs_root()}"
        raise RecipeError(what, f"launched: {_launched()}")
    return folder


def _launched() -> str:
    return ", ".join(folder.name for folder in all_launches()) or "nothing yet"


def _tail(folder: LaunchFolder, label: str, lines: int) -> list[str]:
    path = folder.log(label)
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
