"""`recipes launch` submits Slurm jobs and looks after them; `recipes prefetch` fetches for them."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from recipes_lib.commands import Accelerate, Gpus, Nodes, flag_words
from recipes_lib.config.documents import read
from recipes_lib.config.launch import TRAIN_FLAGS
from recipes_lib.core.environment import require_extra
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, one_line, print_error
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import aligned, next_step, print_json, say
from recipes_lib.jobs.jobs import Backend, Plan
from recipes_lib.jobs.planner import Planner
from recipes_lib.jobs.prefetching import Need, prefetch_needs
from recipes_lib.jobs.records import launched
from recipes_lib.slurm.backend import Slurm
from recipes_lib.slurm.profile import NEW_PROFILE, known_profiles, load_profile
from recipes_lib.study.needs import missing_needs
from recipes_lib.study.progress import raise_all


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
        if first == "status":
            return show_status(Slurm(), rest, as_json=json)
        return cancel(Slurm(), rest)

    # --evals takes what follows it
    named_evals = [word for word in evals if "=" not in word]
    values = rest + list(overrides) + [word for word in evals if "=" in word]
    for word in values:
        if "=" not in word or word.startswith("--"):
            what = f"recipes launch: {word} is neither an option nor section.key=value"
            hint = "one recipe or study at a time; put site options into the profile (sbatch)"
            raise RecipeError(what, hint)
    if not profile:
        hint = f"profiles: {', '.join(known_profiles())}; for a new site: {NEW_PROFILE}"
        raise RecipeError("recipes launch: --profile is missing", hint)

    site = load_profile(profile)
    site.enter()
    planner = Planner(
        site=site,
        overrides=values,
        accelerate=accelerate,
        gpus=gpus,
        nodes=nodes,
        stages=stages,
        evals=named_evals,
        flags=flag_words(resume_anyway=resume_anyway, trust_remote_code=trust_remote_code),
    )
    plan = planner.plan(first)
    needs = missing_needs(plan.recipes.values(), plan.evals, site.host)
    backend = Slurm(site)
    if not prepare and not dry_run:
        raise_all(needs)
        return _submit(backend, plan)
    # nothing starts yet
    plan.warnings.extend(f"warning: {need.what}" for need in needs)
    if dry_run:
        say(*_dry_run_lines(backend, plan, shlex.join(["recipes", *typed])))
        return ExitCode.DONE
    backend.prepare(plan)
    for warning in dict.fromkeys(plan.warnings):
        print_error(warning)
    print(plan.folder)
    return ExitCode.DONE


def _submit(backend: Backend, plan: Plan) -> int:
    """Submit the jobs, and say what waits for what."""
    for warning in dict.fromkeys(plan.warnings):
        say(warning)
    ids = backend.submit(plan)
    for job in plan.jobs:
        line = f"{job.label}: job {ids[job.label]}"
        if len(job.tasks) > 1:
            line += f" ({len(job.tasks)} arms)"
        earlier = job.after + job.after_any
        if earlier:
            line += f", after {', '.join(earlier)}"
        say(line)
    return next_step("launch", "status", plan.name)


def _dry_run_lines(backend: Backend, plan: Plan, typed: str) -> Iterator[str]:
    """Yield commands that bash takes as they stand; what its script holds is comments."""
    for warning in dict.fromkeys(plan.warnings):
        yield f"# {warning}"
    yield "# paste these lines into bash; the first one writes the scripts"
    yield typed.replace(" --dry-run", " --prepare")
    yield from backend.preview(plan)
    yield f"# next: {typed.replace(' --dry-run', '')}"


def show_status(backend: Backend, names: Sequence[str], as_json: bool = False) -> int:
    """Print the jobs of the launches named, or of all."""
    folders = launched(backend.scheduler, names)
    states = {name: backend.states(folder) for name, folder in folders.items()}
    if as_json:
        return print_json({name: list(map(vars, tasks)) for name, tasks in states.items()})
    for name, tasks in states.items():
        say(name)
        rows = [("job", "task", "what", "state", "")]
        rows += [(task.job, task.label, task.what, task.state, task.reason) for task in tasks]
        say(*aligned(rows))
        for task in tasks:
            if task.error:
                say(f"  {task.label}: {task.error}")
        say(f"  logs: {shown_path(folders[name])}")
    if states:
        return ExitCode.DONE
    return next_step("launch", "RECIPE", "--profile", "example", "--dry-run")


def cancel(backend: Backend, names: Sequence[str]) -> int:
    """Cancel every job of the launches named."""
    if not names:
        raise RecipeError("recipes launch cancel: name a run or study")
    for name, folder in launched(backend.scheduler, names).items():
        # an array is cancelled by its number, once
        active = dict.fromkeys(task.job_id for task in backend.states(folder) if task.active)
        if active:
            backend.cancel(list(active))
        cancelled = ", ".join(active) or "nothing: no job is queued or runs"
        say(f"{name}: cancelled {cancelled}")
    return next_step("launch", "status", names[0])


def run_prefetch(
    files: Annotated[list[str], "recipes, studies and evals that need models and data"],
    overrides: Sequence[str],
    *,
    profile: Annotated[str | None, "the site, for folders in its env such as HF_HOME"] = None,
    check: Annotated[bool, "download nothing; check that all is here (exit 5 if not)"] = False,
    trust_remote_code: Annotated[bool, "allow code of lm-eval tasks, if the recipe asks"] = False,
) -> int:
    """Fetch, or check offline, as a job on a compute node does."""
    values = [word for word in files if "=" in word] + list(overrides)
    files = [word for word in files if "=" not in word]
    if not files:
        hint = "recipes prefetch RECIPE evals/alpaca_eval.yaml --profile P"
        raise RecipeError("recipes prefetch: name what to fetch", hint)
    if profile:
        load_profile(profile).enter()
    if check:
        # the Hub's libraries read them once, when they are imported
        for name in ("HUB_OFFLINE", "DATASETS_OFFLINE", "DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ[f"HF_{name}"] = "1"
    require_extra("train")
    evals = [file for file in files if Path(file).is_file() and read(file).kind == "eval"]
    needs: dict[Need, None] = {}  # each once, in order
    for file in files:
        overrides_of_file = values
        if file in evals and len(evals) < len(files):
            overrides_of_file = []  # they are those of the recipes
        needs |= dict.fromkeys(prefetch_needs(file, overrides_of_file, trust_remote_code))
    typed = files + values
    if profile:
        typed += ["--profile", profile]
    if trust_remote_code:
        typed.append("--trust-remote-code")
    missing = 0
    for need in needs:
        try:
            say(f"{need.kind} {need.name}: {need.look(not check)}")
        except Exception as error:  # datasets and lm-eval have exceptions of their own
            what = f"missing: {need.kind} {need.name}: {one_line(error)}"
            command = shlex.join(["recipes", "prefetch"] + typed)
            print_error(RecipesError(what, f"on a machine with a network: {command}"))
            missing += 1
    outcome = "found without a network" if check else "fetched"
    say(f"{len(needs) - missing} of {len(needs)} {outcome}")
    if missing:
        return ExitCode.ENVIRONMENT
    if check:
        return ExitCode.DONE
    return next_step("prefetch", *typed, "--check")
