"""`recipes launch RECIPE|STUDY --profile P`: submit Slurm jobs; status, cancel, logs after that."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from recipes_lib.commands import Accelerate, Gpus, Nodes, flag_words
from recipes_lib.config.documents import read
from recipes_lib.config.launch import TRAIN_FLAGS
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.project import recipe_path
from recipes_lib.core.terminal import count, next_step, say
from recipes_lib.slurm import status
from recipes_lib.slurm.jobs import JobPlan, Planner
from recipes_lib.slurm.prefetching import missing_models
from recipes_lib.slurm.profile import SiteProfile, known_profiles, load_profile
from recipes_lib.slurm.submit import directives, job_commands, submit_chain
from recipes_lib.slurm.submit import dry_run as sbatch_lines
from recipes_lib.slurm.submit import prepare as write_scripts
from recipes_lib.study.config import study_file

EPILOG = (
    "recipes launch status [NAME], cancel NAME, logs NAME [--stage S] look after what was launched."
)


def run(
    words: Annotated[list[str], "a recipe or a study; or: status [NAME], cancel NAME, logs NAME"],
    overrides: Sequence[str],
    typed: Sequence[str],
    *,
    profile: Annotated[str | None, "the site: a name in launch/profiles/, or a path"] = None,
    accelerate: Accelerate = None,
    nodes: Nodes = None,
    gpus: Gpus = None,
    stages: Annotated[str | None, "of train,eval,report; default: all"] = None,
    evals: Annotated[list[str], "what to evaluate a recipe on; default: the three of evals/"] = [],  # noqa: B006 (it is not changed)
    dry_run: Annotated[bool, "print the sbatch lines and what the scripts run, no more"] = False,
    prepare: Annotated[bool, "only write the scripts of the jobs, and print their folder"] = False,
    wait: Annotated[bool, "wait until the whole chain is over; its exit code"] = False,
    resume_anyway: Annotated[bool, TRAIN_FLAGS["resume_anyway"]] = False,
    trust_remote_code: Annotated[bool, TRAIN_FLAGS["trust_remote_code"]] = False,
    stage: Annotated[str | None, "logs: the task, for example train or eval-mt_bench"] = None,
    lines: Annotated[int, "logs: lines of each task (default 40)"] = 40,
    json: Annotated[bool, "status: print one JSON object"] = False,
) -> int:
    """Submit, print or look."""
    first, *rest = words
    if first in ("status", "cancel", "logs") and not Path(first).exists():
        if overrides:
            raise RecipeError(f"recipes launch {first}: unknown argument '{overrides[0]}'")
        if first == "status":
            return status.show_status(rest, as_json=json)
        return status.cancel(rest) if first == "cancel" else status.show_logs(rest, stage, lines)
    # --evals takes what follows it
    values = [*rest, *overrides, *(word for word in evals if "=" in word)]
    if wrong := [word for word in values if "=" not in word or word.startswith("--")]:
        raise RecipeError(
            f"recipes launch: {wrong[0]} is neither an option nor section.key=value",
            "one recipe or study at a time; put options of the site into its profile: sbatch",
        )
    if study_file(first) is None:
        read(recipe_path(first))  # what is not there is named before a profile that is missing
    if not profile:
        hint = f"profiles: {', '.join(known_profiles())}, or a copy of launch/profiles/example.yaml"
        raise RecipeError("recipes launch: --profile is missing", hint)
    if dry_run + prepare + wait > 1:
        raise RecipeError("recipes launch: --dry-run, --prepare or --wait, only one of them")
    site = load_profile(profile)
    site.enter()
    flags = flag_words(resume_anyway=resume_anyway, trust_remote_code=trust_remote_code)
    named = [word for word in evals if "=" not in word]
    planner = Planner(site, values, accelerate, gpus, nodes, stages, named, flags)
    plan = planner.plan(first)
    if prepare:
        write_scripts(plan, site)
        print(plan.folder)
        return ExitCode.DONE
    remarks = list(plan.warnings)
    if missing := missing_models(plan.models) if site.values.offline else []:
        fetch = shlex.join(["recipes", "prefetch", first, *plan.evals, *values])
        what = f"not on this machine, and jobs have no network: {', '.join(missing)}"
        remarks.append(f"warning: {what}: {fetch} --profile {shlex.quote(profile)}")
    if dry_run:
        typed_line = shlex.join(["recipes", *typed])
        say("\n".join(_dry_run_lines(plan, site, typed_line, remarks)))
        return ExitCode.DONE
    for remark in remarks:
        say(remark)
    status.refuse_if_active(plan.name)
    ids = submit_chain(plan, site)
    for job in plan.jobs:
        arms = f" ({len(job.tasks)} arms)" if len(job.tasks) > 1 else ""
        waits = ", ".join([*job.after, *job.after_any])
        say(f"{job.label}: job {ids[job.label]}{arms}{f', after {waits}' if waits else ''}")
    if wait:
        return status.wait(plan.name)
    return next_step("recipes", "launch", "status", plan.name)


def _dry_run_lines(
    plan: JobPlan, site: SiteProfile, typed: str, remarks: list[str]
) -> Iterator[str]:
    """Yield commands that bash takes as they stand; what its script holds is comments."""
    yield from (f"# {remark}" for remark in remarks)
    yield "# bash takes these lines as they are; the first one writes the scripts"
    yield typed.replace(" --dry-run", " --prepare")
    for job, line in sbatch_lines(plan):
        unit = ("GPU",) if job.gpus else ("process", "processes")
        arms = f"{len(job.tasks)} arms, each " if len(job.tasks) > 1 else ""
        yield f"# {job.label}: {arms}{count(job.nodes, 'node')} x {count(job.processes, *unit)}"
        yield line
        script = [*directives(job, plan.folder, site.values), *job_commands(job, site.values)]
        yield from (f"#     {text}" for text in "\n".join(script).split("\n"))
    yield f"# next: {typed.replace(' --dry-run', '')}"
