"""The folder of a submission, runs/<name>/slurm/: a script for each job, the snapshot, the job ids,
the logs and exit codes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.core.atomic_files import write_json, write_text
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import runs_root
from recipes_lib.core.terminal import warn
from recipes_lib.slurm.jobs import Job

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

    def script(self, label: str) -> Path:
        """The script of a job."""
        return self.path / f"{label}.sbatch"

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
        """Holds the id of a job that was submitted by hand: a pasted line writes it, and so does
        the job when it starts.
        """
        return self.path / f"{label}.job"

    def read_jobs(self) -> list[dict[str, Any]]:
        """Return the submitted jobs; empty where none was.

        Raises:
            DamagedFile: jobs.json is not what was written to it.
        """
        submitted = []
        for row in read_object(
            self.jobs_file, "squeue lists the jobs; submitting them again writes it anew"
        ).get("jobs", []):
            with suppress(FileNotFoundError):
                row["id"] = (
                    row["id"] or self.job_file(row["label"]).read_text().strip().partition(";")[0]
                )
            submitted += [row] if row["id"] else []
        return submitted

    def write_jobs(self, jobs: Iterable[Job], ids: Mapping[str, str], profile: str | None) -> None:
        """Note the jobs, with the ids of those that `recipes launch` submitted."""
        rows = [
            {
                "label": job.label,
                "stage": job.stage,
                "id": ids.get(job.label),
                "tasks": [task.what for task in job.tasks],
            }
            for job in jobs
        ]
        write_json(
            self.jobs_file, {"format_version": _FORMAT_VERSION, "profile": profile, "jobs": rows}
        )

    def write_scripts(self, jobs: Sequence[Job], texts: Mapping[str, str]) -> None:
        """Write {label: script} of the jobs, in place of what an earlier submission left; logs
        stay.

        `order` names them for launch/local.sh: a job a line, or a task of an array.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in (
            path for path in self.path.iterdir() if path.suffix in (".sbatch", ".exit_code", ".job")
        ):
            stale.unlink()
        for errors in self.path.glob("*.errors"):
            shutil.rmtree(errors)
        for label, text in texts.items():
            write_text(self.script(label), text)
        tasks = [
            f"{job.label} {index}" if job.is_array else job.label
            for job in jobs
            for index in range(len(job.tasks))
        ]
        write_text(self.path / "order", "".join(f"{task}\n" for task in tasks))


def launch_folder(name: str, root: Path | None = None) -> LaunchFolder:
    """Return the folder of a run or study."""
    return LaunchFolder((root or runs_root()).resolve() / name / "slurm")


def all_launches(root: Path | None = None) -> list[LaunchFolder]:
    """Return everything that was launched, by name."""
    folders = [
        LaunchFolder(file.parent)
        for file in sorted((root or runs_root()).resolve().glob("*/slurm/jobs.json"))
    ]
    return [folder for folder in folders if _was_launched(folder)]


def _was_launched(folder: LaunchFolder) -> bool:
    try:
        return bool(folder.read_jobs())
    except DamagedFile as error:  # it costs only its own line
        warn(f"{str(error).splitlines()[0]}; left out")
        return False
