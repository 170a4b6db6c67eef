"""The folder of a submission, runs/<name>/slurm/: the commands of the jobs, the site's environment, the snapshot, the job ids, the logs.

launch/job.sbatch reads it on the compute node; `recipes launch status`, `cancel` and `logs` read it on the login node.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.atomic_files import write_json, write_text
from recipes_lib.json_files import DamagedFile, read_object
from recipes_lib.launching.jobs import Job, check_job_words
from recipes_lib.launching.profile import SiteProfile
from recipes_lib.recipe.project import cache_root, runs_root
from recipes_lib.terminal import warn

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class LaunchFolder:
    """runs/<name>/slurm/."""

    path: Path

    @property
    def name(self) -> str:
        """The run or study it belongs to."""
        return self.path.parent.name

    @property
    def jobs_file(self) -> Path:
        """The jobs that were submitted, with their ids."""
        return self.path / "jobs.json"

    def log(self, task_label: str) -> Path:
        """The log of a task; requeues append to it."""
        return self.path / f"{task_label}.log"

    def exit_code(self, task_label: str) -> int | None:
        """Return the code a task ended with; None while it is not over, or was killed."""
        try:
            return int((self.path / f"{task_label}.exit_code").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def first_error(self, task_label: str) -> str | None:
        """Return what the first failing rank said."""
        errors = sorted((self.path / f"{task_label}.errors").glob("*"))
        return errors[0].read_text(encoding="utf-8", errors="replace").strip() if errors else None

    def job_file(self, label: str) -> Path:
        """Holds the id of a job that was submitted by hand: a pasted line writes it, and so does the job when it starts."""
        return self.path / f"{label}.job"

    def read_jobs(self) -> list[dict[str, Any]]:
        """Return the submitted jobs; empty where none was.

        Raises:
            DamagedFile: jobs.json is not what was written to it.
        """
        submitted = []
        for row in read_object(self.jobs_file, "squeue lists the jobs; submitting them again writes it anew").get("jobs", []):
            with suppress(FileNotFoundError):
                row["id"] = row["id"] or self.job_file(row["label"]).read_text().strip().partition(";")[0]
            submitted += [row] if row["id"] else []
        return submitted

    def write_jobs(self, jobs: Iterable[Job], ids: Mapping[str, str], profile: str | None) -> None:
        """Note the jobs, with the ids of those that `recipes launch` submitted."""
        rows = [
            {"label": job.label, "stage": job.stage, "id": ids.get(job.label), "tasks": [task.what for task in job.tasks]} for job in jobs
        ]
        write_json(self.jobs_file, {"format_version": _FORMAT_VERSION, "profile": profile, "jobs": rows})

    def write_commands(self, jobs: Sequence[Job], environment: str) -> None:
        """Write what launch/job.sbatch reads, in place of what an earlier submission left; logs stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in (path for path in self.path.iterdir() if path.suffix in (".args", ".processes", ".exit_code", ".job")):
            stale.unlink()
        for errors in self.path.glob("*.errors"):
            shutil.rmtree(errors)
        write_text(self.path / "env.sh", environment)
        write_text(self.path / "order", "".join(f"{label}\n" for job in jobs for label in job.task_labels()))
        for job in jobs:
            for label, task in zip(job.task_labels(), job.tasks, strict=True):
                write_text(self.path / f"{label}.args", "".join(f"{word}\n" for word in check_job_words(task.args)))
                write_text(self.path / f"{label}.processes", f"{job.shape.processes} {job.shape.distributed_type}\n")
                if task.check:
                    write_text(self.path / f"{label}.check.args", "".join(f"{word}\n" for word in check_job_words(task.check)))


def launch_folder(name: str, root: Path | None = None) -> LaunchFolder:
    """Return the folder of a run or study."""
    return LaunchFolder((root or runs_root()).resolve() / name / "slurm")


def all_launches(root: Path | None = None) -> list[LaunchFolder]:
    """Return everything that was launched, by name."""
    folders = [LaunchFolder(file.parent) for file in sorted((root or runs_root()).resolve().glob("*/slurm/jobs.json"))]
    return [folder for folder in folders if _was_launched(folder)]


def _was_launched(folder: LaunchFolder) -> bool:
    try:
        return bool(folder.read_jobs())
    except DamagedFile as error:  # it costs only its own line
        warn(f"{str(error).splitlines()[0]}; left out")
        return False


def environment_script(profile: SiteProfile | None) -> str:
    """Return env.sh: what a job sources before its command. Every line that fails ends the job; values are quoted.

    Without a profile (plain `sbatch launch/job.sbatch`) it only says where the runs are.
    """
    lines = ["# What the profile says about the site; sourced by launch/job.sbatch."]
    variables = {"RECIPES_RUNS_ROOT": str(runs_root().resolve()), "RECIPES_CACHE": str(cache_root().resolve())}
    if profile is not None:
        values, environment = profile.values, profile.values.environment
        lines += [f"MAX_REQUEUES={values.max_requeues}"]
        lines += [f"SRUN_WORDS=({shlex.join(environment.srun)})"] if environment.srun else []
        lines += [f"module load {shlex.quote(name)}" for name in environment.modules]
        if environment.conda:
            lines += ['eval "$("${CONDA_EXE:-conda}" shell.bash hook)"', f"conda activate {shlex.quote(environment.conda)}"]
        if environment.venv:
            lines += [f"source {shlex.quote(str(Path(environment.venv).expanduser() / 'bin' / 'activate'))}"]
        for key, variable in (("hub", "HF_HOME"), ("temporary", "TMPDIR")):
            folder = profile.directory(key)
            variables |= {variable: folder} if folder else {}
        variables |= {"HF_HUB_OFFLINE": "1"} if values.offline else {}
        variables |= {"VLLM": str(Path(values.vllm).expanduser())} if values.vllm else {}
        variables |= values.variables
        lines += [f"export {name}={_quoted(value)}" for name, value in variables.items()]
        lines += ['mkdir -p "$TMPDIR"'] if values.directories.temporary else []
        lines += environment.setup
    else:
        lines += [f"export {name}={_quoted(value)}" for name, value in variables.items()]
    first, *rest = lines
    return "\n".join([first, *(f"{line} || return 5" for line in rest), ""])


def _quoted(value: str) -> str:
    """Quote for bash; `{job}` becomes the job's id."""
    parts = [shlex.quote(part) for part in re.split(r"\{job\}", value)]
    return '"${SLURM_JOB_ID:-$$}"'.join("" if part == "''" and len(parts) > 1 else part for part in parts)
