"""Submitting a chain: each job waits for those before it, and either all are in the queue or none is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from recipes_lib.errors import RecipeError, RecipeErrors, RecipesError
from recipes_lib.launching.folder import environment_script
from recipes_lib.launching.jobs import Job
from recipes_lib.launching.profile import SiteProfile
from recipes_lib.launching.recipe_jobs import JobPlan
from recipes_lib.launching.sbatch import named, sbatch_argv, scancel, submit, try_submission


def submit_chain(plan: JobPlan, profile: SiteProfile) -> dict[str, str]:
    """Write the submission's folder, submit every job, and return {label: job id}.

    Raises:
        RecipesError: Slurm refused a job; those before it are cancelled, or named where that failed too.
    """
    prepare(plan, profile)
    ids: dict[str, str] = {}
    try:
        for job in plan.jobs:
            argv = sbatch_argv(job, plan.folder, profile, dependencies_of(job, ids))
            ids[job.label] = submit(argv, profile, job.stage)
            plan.folder.write_jobs(plan.jobs, ids, profile.name)
    except BaseException as error:
        try:
            scancel(list(ids.values()))
        except RecipesError as second:
            left = f"still queued: {', '.join(ids)} ({second.what}); when Slurm answers: recipes launch cancel {plan.name}"
        else:
            plan.folder.jobs_file.unlink(missing_ok=True)
            left = f"nothing is queued: {', '.join(ids)} had been accepted and {'is' if len(ids) == 1 else 'are'} cancelled"
        if ids and isinstance(error, RecipesError):
            error.hints = (*error.hints, left)
        raise
    return ids


def prepare(plan: JobPlan, profile: SiteProfile | None) -> None:
    """Write what the jobs read, and which jobs there will be."""
    plan.folder.write_commands(plan.jobs, environment_script(profile))
    plan.folder.write_jobs(plan.jobs, {}, profile.name if profile else None)
    plan.snapshot.write()


def dependencies_of(job: Job, ids: Mapping[str, str]) -> list[str]:
    """Return the job's dependencies in Slurm's words."""
    ok = [named(ids, label) for label in job.after]
    ended = [named(ids, label) for label in job.after_any]
    return [*(["afterok:" + ":".join(ok)] if ok else []), *(["afterany:" + ":".join(ended)] if ended else [])]


def dry_run(plan: JobPlan, profile: SiteProfile) -> Iterator[tuple[str, Job]]:
    """Yield the exact sbatch line of each job, as bash takes it.

    A variable keeps the job's id for the lines of those that wait for it, a file keeps it for `recipes launch status`.
    """
    names = {job.label: re.sub(r"\W", "_", job.label) for job in plan.jobs}
    ids = {label: f"${{{name}}}" for label, name in names.items()}
    for job in plan.jobs:
        words = sbatch_argv(job, plan.folder, profile, dependencies_of(job, ids))
        line = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in words)
        yield f"{names[job.label]}=$({line} | tee {shlex.quote(str(plan.folder.job_file(job.label)))})", job


def test_chain(plan: JobPlan, profile: SiteProfile) -> Iterator[tuple[Job, str]]:
    """Yield what Slurm says to each job, without queueing any.

    Raises:
        RecipeErrors: what it would refuse, every job's.
    """
    refused = []
    for job in plan.jobs:
        try:
            yield job, try_submission(sbatch_argv(job, plan.folder, profile), profile, job.stage)
        except RecipeError as error:
            refused.append(error)
    if refused:
        raise RecipeErrors({str(error): error for error in refused}.values())
