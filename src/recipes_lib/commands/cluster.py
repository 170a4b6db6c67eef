"""`recipes launch` submits Slurm jobs and looks after them; `recipes prefetch` fetches for them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from recipes_lib.commands import Accelerate, Gpus, Nodes, flag_words
from recipes_lib.config.documents import read
from recipes_lib.config.launch import TRAIN_FLAGS
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, one_line, print_error
from recipes_lib.core.terminal import count, next_step, say
from recipes_lib.slurm import queue
from recipes_lib.slurm.jobs import JobPlan, Planner, directives, job_commands
from recipes_lib.slurm.prefetching import prefetch_needs
from recipes_lib.slurm.profile import NEW_PROFILE, Profile, known_profiles, load_profile
from recipes_lib.study.needs import missing_needs
from recipes_lib.study.run import raise_all

if TYPE_CHECKING:
    from recipes_lib.slurm.prefetching import Need


def run_launch(
    words: Annotated[list[str], "a recipe or a study; or: status [NAME], cancel NAME"],
    overrides: Sequence[str],
    typed: Sequence[str],
    *,
    profile: Annotated[str | None, "the site: a name in launch/profiles/, or a path"] = None,
    accelerate: Accelerate = None,
    nodes: Nodes = None,
    gpus: Gpus = None,
    stages: Annotated[str | None, "some of train,eval,report; default: all"] = None,
    evals: Annotated[list[str], "eval recipes for a recipe; default: the three in evals/"] = [],
    dry_run: Annotated[bool, "only print the sbatch lines and what the scripts run"] = False,
    prepare: Annotated[bool, "only write the jobs' scripts and print their folder"] = False,
    resume_anyway: Annotated[bool, TRAIN_FLAGS["resume_anyway"]] = False,
    trust_remote_code: Annotated[bool, TRAIN_FLAGS["trust_remote_code"]] = False,
    json: Annotated[bool, "status: print one JSON object"] = False,
) -> int:
    """Submit a recipe or a study, print what would be submitted, or look after it."""
    first, *rest = words
    if first in ("status", "cancel") and not Path(first).exists():
        if overrides:
            raise RecipeError(f"recipes launch {first}: unknown argument '{overrides[0]}'")
        return queue.show_status(rest, as_json=json) if first == "status" else queue.cancel(rest)
    # --evals takes what follows it
    values = [*rest, *overrides, *(word for word in evals if "=" in word)]
    if wrong := [word for word in values if "=" not in word or word.startswith("--")]:
        raise RecipeError(
            f"recipes launch: {wrong[0]} is neither an option nor section.key=value",
            "one recipe or study at a time; put site options into the profile (sbatch)",
        )
    if not profile:
        hint = f"profiles: {', '.join(known_profiles())}; for a new site: {NEW_PROFILE}"
        raise RecipeError("recipes launch: --profile is missing", hint)
    site = load_profile(profile)
    site.enter()
    flags = flag_words(resume_anyway=resume_anyway, trust_remote_code=trust_remote_code)
    named = [word for word in evals if "=" not in word]
    planner = Planner(
        profile=site,
        overrides=values,
        accelerate=accelerate,
        gpus=gpus,
        nodes=nodes,
        named_stages=stages,
        evals=named,
        flags=flags,
        largest_array=queue.largest_array,
    )
    plan = planner.plan(first)
    needs = missing_needs(plan.recipes.values(), plan.evals, site.site())
    if prepare or dry_run:  # nothing starts yet
        plan.warnings.extend(f"warning: {need.what}" for need in needs)
    else:
        raise_all(needs)
    if prepare:
        queue.prepare(plan, site)
        for warning in dict.fromkeys(plan.warnings):
            print_error(warning)
        print(plan.folder)
        return ExitCode.DONE
    if dry_run:
        say(*_dry_run_lines(plan, site, shlex.join(["recipes", *typed])))
        return ExitCode.DONE
    for warning in dict.fromkeys(plan.warnings):
        say(warning)
    ids = queue.submit_chain(plan, site)
    for job in plan.jobs:
        arms = f" ({len(job.tasks)} arms)" if len(job.tasks) > 1 else ""
        waits = ", ".join([*job.after, *job.after_any])
        say(f"{job.label}: job {ids[job.label]}{arms}{f', after {waits}' if waits else ''}")
    return next_step("launch", "status", plan.name)


def _dry_run_lines(plan: JobPlan, site: Profile, typed: str) -> Iterator[str]:
    """Yield commands that bash takes as they stand; what its script holds is comments."""
    yield from (f"# {warning}" for warning in dict.fromkeys(plan.warnings))
    yield "# paste these lines into bash; the first one writes the scripts"
    yield typed.replace(" --dry-run", " --prepare")
    for job, line in queue.sbatch_lines(plan):
        unit = "GPU" if job.uses_gpus else "process"
        arms = f"{len(job.tasks)} arms, each " if len(job.tasks) > 1 else ""
        yield f"# {job.label}: {arms}{count(job.nodes, 'node')} x {count(job.processes, unit)}"
        yield line
        script = [*directives(job, plan.folder, site), *job_commands(job)]
        yield from (f"#     {text}" for text in "\n".join(script).split("\n"))
    yield f"# next: {typed.replace(' --dry-run', '')}"


def run_prefetch(
    words: Annotated[list[str], "recipes, studies and evals that need the files"],
    overrides: Sequence[str],
    *,
    profile: Annotated[str | None, "the site, for folders in its env such as HF_HOME"] = None,
    check: Annotated[bool, "download nothing; check that all is here (exit 5 if not)"] = False,
    trust_remote_code: Annotated[bool, "allow code of lm-eval tasks, if the recipe asks"] = False,
) -> int:
    """Fetch, or check offline, as a job on a compute node does."""
    files = [word for word in words if "=" not in word]
    values = [*(word for word in words if "=" in word), *overrides]
    if not files:
        hint = "recipes prefetch RECIPE evals/alpaca_eval.yaml --profile P"
        raise RecipeError("recipes prefetch: name what to fetch", hint)
    if profile:
        load_profile(profile).enter()
    if check:
        # the Hub's libraries read them once, when they are imported
        for name in ("HUB_OFFLINE", "DATASETS_OFFLINE", "DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ[f"HF_{name}"] = "1"
    evals = [file for file in files if Path(file).is_file() and read(file).kind == "eval"]
    needs: dict[Need, None] = {}
    for file in files:
        asked = values if file not in evals or evals == files else []  # they are the recipe's
        needs |= dict.fromkeys(prefetch_needs(file, asked, trust_remote_code))
    missing = 0
    for need in needs:
        try:
            say(f"{need.kind} {need.name}: {need.look(not check)}")
        except Exception as error:  # datasets and lm-eval have exceptions of their own
            what = f"missing: {need.kind} {need.name}: {one_line(error)}"
            print_error(RecipesError(what, "on a machine with a network: recipes prefetch"))
            missing += 1
    how = "found without a network" if check else "fetched"
    say(f"{len(needs) - missing} of {len(needs)} {how}")
    if missing or check:
        return ExitCode.ENVIRONMENT if missing else ExitCode.DONE
    return next_step("prefetch", *files, *values, "--check")
