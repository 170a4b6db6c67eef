"""`recipes launch RECIPE|STUDY --profile P`: submit a chain of Slurm jobs; `recipes launch
status|cancel|logs`: look after it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from recipes_lib.commands import at_least, flag_words
from recipes_lib.config.launch import TRAIN_FLAGS, add_train_flags
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.terminal import next_step, say
from recipes_lib.slurm import status
from recipes_lib.slurm.jobs import JobPlan, LaunchRequest, plan_target
from recipes_lib.slurm.prefetching import missing_models
from recipes_lib.slurm.profile import SiteProfile, load_profile, profile_names
from recipes_lib.slurm.submit import (
    LaunchFolder,
    directives,
    dry_run,
    job_commands,
    prepare,
    submit_chain,
)

ACTIONS = ("status", "cancel", "logs")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    what = "what to launch, then section.key=value words; or: status [NAME]"
    add("words", nargs="+", metavar="RECIPE|STUDY", help=what)
    parser.epilog = (
        "recipes launch status [NAME], cancel NAME, logs NAME [--stage S] look after what was"
        " launched"
    )
    add("--profile", metavar="P", help="the site: a name in launch/profiles/, or a path")
    config = "a file in accelerate_configs/, or a path; default: the recipe's launch.accelerate"
    add("--accelerate", metavar="A", help=config)
    nodes = "machines; default: the recipe's launch.nodes"
    add("--nodes", type=at_least(1), metavar="N", help=nodes)
    gpus = "GPUs per machine; default: the recipe's launch.gpus"
    add("--gpus", type=at_least(1), metavar="G", help=gpus)
    add("--stages", metavar="LIST", help="of train,eval,report; default: all")
    evals = "what to evaluate a recipe on; default: the three of evals/"
    add("--evals", nargs="+", metavar="EVAL", help=evals)
    how = parser.add_mutually_exclusive_group()
    for flag, help in (
        ("--dry-run", "print the sbatch lines and what the scripts ask and run, and do nothing"),
        ("--prepare", "only write the scripts of the jobs, and print their folder"),
        ("--wait", "wait until the whole chain is over; its exit code"),
    ):
        how.add_argument(flag, action="store_true", help=help)
    add_train_flags(parser)
    add("--stage", metavar="S", help="logs: the task, for example train or eval-mt_bench")
    lines = "logs: lines of each task (default 40)"
    add("--lines", type=at_least(1), default=40, metavar="N", help=lines)
    add("--json", action="store_true", help="status: print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Submit, print or look."""
    first, *rest = args.words
    if first in ACTIONS and not Path(first).exists():
        if args.overrides:
            raise RecipeError(f"recipes launch {first}: unknown argument '{args.overrides[0]}'")
        if first == "status":
            return status.show_status(rest, as_json=args.json)
        if first == "cancel":
            return status.cancel(rest)
        return status.show_logs(rest, args.stage, args.lines)
    # --evals takes what follows it
    overrides = [*rest, *args.overrides, *(word for word in args.evals or () if "=" in word)]
    args.evals = [word for word in args.evals or () if "=" not in word]
    names = [word.partition("=")[0] for word in overrides]
    if flags := [name for name in names if name.startswith("-") and "." not in name]:
        raise RecipeError(
            f"recipes launch: {flags[0]} is not an option of recipes launch",
            f"put options of the site into the profile, {args.profile or 'launch/profiles/...'}:"
            " sbatch",
            "all options: recipes launch --help",
        )
    if strangers := [word for word in overrides if "=" not in word]:
        what = f"recipes launch: '{strangers[0]}' is neither an option nor section.key=value"
        raise RecipeError(what, "one recipe or study at a time")
    if not args.profile:
        raise RecipeError(
            "recipes launch: --profile is missing",
            f"there are {', '.join(profile_names())}",
            "a new site: copy launch/profiles/example.yaml",
        )
    return _launch(args, first, overrides)


def _launch(args: argparse.Namespace, target: str, overrides: list[str]) -> int:
    """Plan the jobs, then do what was asked with them."""
    profile = load_profile(args.profile)
    profile.enter()
    flags = flag_words(args, TRAIN_FLAGS)
    asked = LaunchRequest(
        overrides, args.accelerate, args.gpus, args.nodes, args.stages, args.evals, flags
    )
    plan = plan_target(target, profile, asked)
    if args.prepare:
        print(prepare(plan, profile).path)
        return ExitCode.DONE
    words = sys.argv[2:] if sys.argv[1:2] == ["launch"] else [target]
    typed = shlex.join(["recipes", "launch", *words])
    fetch = shlex.join([target, *plan.evals, *overrides])
    remarks = _remarks(plan, profile, f"recipes prefetch {fetch} --profile {args.profile}")
    if args.dry_run:
        _show(plan, profile, typed, remarks)
        return ExitCode.DONE
    for remark in remarks:
        say(remark)
    folder = LaunchFolder(plan.folder)
    if folder.jobs_file.is_file():
        status.refuse_if_active(folder)
    ids = submit_chain(plan, profile)
    for job in plan.jobs:
        arms = f" ({len(job.tasks)} arms)" if len(job.tasks) > 1 else ""
        waits = ", ".join([*job.after, *job.after_any])
        say(f"{job.label}: job {ids[job.label]}{arms}{f', after {waits}' if waits else ''}")
    if args.wait:
        return status.wait(folder)
    next_step(f"recipes launch status {plan.name}")
    return ExitCode.DONE


def _remarks(plan: JobPlan, profile: SiteProfile, prefetch: str) -> list[str]:
    """Return what to say before: the plan's warnings, and which models are not here yet, where the
    jobs cannot fetch them.

    Args:
        plan: the jobs.
        profile: the site.
        prefetch: the command that fetches everything.
    """
    remarks = list(plan.warnings)
    if profile.values.offline and (missing := missing_models(plan.models)):
        verb = "is" if len(missing) == 1 else "are"
        what = f"{' and '.join(missing)} {verb} not on this machine, and jobs have no network"
        remarks.append(f"warning: {what}: {prefetch}")
    return remarks


def _show(plan: JobPlan, profile: SiteProfile, typed: str, remarks: list[str]) -> None:
    """Print commands that bash takes as they stand: the one that writes the scripts, and the sbatch
    line of each job; what its script asks for and runs are comments.
    """
    for remark in remarks:
        say(f"# {remark}")
    say("# bash takes these lines as they are; the first one writes the scripts")
    say(typed.replace(" --dry-run", " --prepare"))
    for job, line in dry_run(plan):
        unit = "GPU" if job.gpus else "process"
        arms = f"{len(job.tasks)} arms, each " if len(job.tasks) > 1 else ""
        say(f"# {job.label}: {arms}{job.nodes} node x {job.processes} {unit}")
        say(line)
        asked = directives(job, plan.folder, profile.values)
        for text in "\n".join([*asked, *job_commands(job, profile.values)]).split("\n"):
            say(f"#     {text}")
    say(f"# next: {typed.replace(' --dry-run', '')}")
