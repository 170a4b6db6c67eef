"""`recipes launch RECIPE|STUDY --profile P`: submit a chain of Slurm jobs; `recipes launch
status|cancel|logs`: look after it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.terminal import at_least, next_step, say
from recipes_lib.slurm import watching
from recipes_lib.slurm.profile import load_profile, profile_names

if TYPE_CHECKING:
    from recipes_lib.slurm.profile import SiteProfile
    from recipes_lib.slurm.recipe_jobs import JobPlan

ACTIONS = ("status", "cancel", "logs")
TRAIN_FLAGS = ("resume_anyway", "allow_partial_resume", "trust_remote_code")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RECIPE|STUDY",
        help="what to launch, then section.key=value words; or: status [NAME]",
    )
    parser.epilog = (
        "recipes launch status [NAME], cancel NAME, logs NAME [--stage S] look after what was"
        " launched"
    )
    parser.add_argument(
        "--profile", metavar="P", help="the site: a name in launch/profiles/, or a path"
    )
    parser.add_argument(
        "--accelerate",
        metavar="A",
        help="a file in accelerate_configs/, or a path; default: the recipe's launch.accelerate",
    )
    parser.add_argument(
        "--nodes",
        type=at_least(1),
        metavar="N",
        help="machines; default: the recipe's launch.nodes",
    )
    parser.add_argument(
        "--gpus",
        type=at_least(1),
        metavar="G",
        help="GPUs per machine; default: the recipe's launch.gpus",
    )
    parser.add_argument("--stages", metavar="LIST", help="of train,eval,report; default: all")
    parser.add_argument(
        "--evals",
        nargs="+",
        metavar="EVAL",
        help="what to evaluate a recipe on; default: the three of evals/",
    )
    parser.add_argument(
        "--throttle",
        type=at_least(1),
        metavar="N",
        help="arms of a study that train at the same time; default: the profile's",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print the sbatch lines and what the scripts ask and run, and do nothing",
    )
    how.add_argument(
        "--test-only",
        action="store_true",
        help="ask Slurm whether it would take the jobs; nothing is queued",
    )
    how.add_argument(
        "--prepare",
        action="store_true",
        help="only write the scripts of the jobs, and print their folder",
    )
    how.add_argument(
        "--wait", action="store_true", help="wait until the whole chain is over; its exit code"
    )
    for flag, help in (
        ("--resume-anyway", "continue a run although settings that change its result differ"),
        (
            "--allow-partial-resume",
            "continue from a checkpoint that lacks optimizer or random state",
        ),
        (
            "--trust-remote-code",
            "allow code that ships with the model, if the recipe asks for it too",
        ),
    ):
        parser.add_argument(flag, action="store_true", help=help)
    parser.add_argument(
        "--stage",
        metavar="S",
        help="logs: the stage, for example train or eval-mt_bench; default: all",
    )
    parser.add_argument(
        "--lines",
        type=at_least(1),
        default=40,
        metavar="N",
        help="logs: lines of each stage (default 40)",
    )
    parser.add_argument("--json", action="store_true", help="status: print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Submit, print or look."""
    first, *rest = args.words
    if first in ACTIONS and not Path(first).exists():
        if args.overrides:
            raise RecipeError(f"recipes launch {first}: unknown argument '{args.overrides[0]}'")
        if first == "status":
            return watching.show_status(rest, as_json=args.json)
        return (
            watching.cancel(rest)
            if first == "cancel"
            else watching.show_logs(rest, args.stage, args.lines)
        )
    overrides = [
        *rest,
        *args.overrides,
        *(word for word in args.evals or () if "=" in word),
    ]  # --evals takes what follows it
    args.evals = [word for word in args.evals if "=" not in word] if args.evals else None
    flag = next(
        (
            word.partition("=")[0]
            for word in overrides
            if word.startswith("-") and "." not in word.partition("=")[0]
        ),
        None,
    )
    if flag:
        raise RecipeError(
            f"recipes launch: {flag} is no option of recipes launch",
            "what the site wants belongs into its profile,"
            f" {args.profile or 'launch/profiles/NAME.yaml'}: its keys, or extra_sbatch",
            "all options: recipes launch --help",
        )
    strangers = [word for word in overrides if "=" not in word]
    if strangers:
        raise RecipeError(
            f"recipes launch: '{strangers[0]}' is neither an option nor section.key=value",
            "one recipe or study at a time",
        )
    if not args.profile and not args.prepare:
        raise RecipeError(
            "recipes launch: --profile is missing",
            f"there are {', '.join(profile_names())}; a new site: copy launch/profiles/example.yaml"
            " and fill in six values",
        )
    return _launch(args, first, overrides)


def _launch(args: argparse.Namespace, target: str, overrides: list[str]) -> int:
    """JobPlan the jobs, then do what was asked with them."""
    from recipes_lib.slurm import submission, watching
    from recipes_lib.slurm.planning import plan_target

    profile = load_profile(args.profile) if args.profile else None
    if profile is not None:
        profile.enter()
    flags = [f"--{name.replace('_', '-')}" for name in TRAIN_FLAGS if getattr(args, name)]
    plan = plan_target(target, overrides, profile, args, flags)
    typed = (
        shlex.join(["recipes", "launch", *sys.argv[2:]])
        if sys.argv[1:2] == ["launch"]
        else f"recipes launch {target}"
    )
    if args.prepare:
        submission.prepare(plan, profile)
        print(plan.folder.path)
        return ExitCode.DONE
    assert profile is not None
    _warn(
        plan,
        profile,
        f"recipes prefetch {shlex.join([target, *plan.evals, *overrides])} --profile"
        f" {args.profile}",
    )
    if args.dry_run:
        say("# the lines below can be pasted into bash, after this one, which writes the scripts:")
        say(f"$ {typed.replace(' --dry-run', ' --prepare')}")
        _show(plan, profile)
        next_step(f"{typed.replace(' --dry-run', '')}   (submits; --test-only asks Slurm first)")
        return ExitCode.DONE
    if args.test_only:
        for job, answer in submission.test_chain(plan, profile):
            say(f"{job.label}: {answer}")
        next_step(typed.replace(" --test-only", ""))
        return ExitCode.DONE
    watching.refuse_if_active(plan.folder)
    ids = submission.submit_chain(plan, profile)
    for job in plan.jobs:
        waits = (
            f", after {', '.join([*job.after, *job.after_any])}"
            if job.after or job.after_any
            else ""
        )
        say(
            f"{job.label}: job"
            f" {ids[job.label]}{f' ({len(job.tasks)} arms)' if job.is_array else ''}{waits}"
        )
    if args.wait:
        return watching.wait(plan.folder)
    next_step(f"recipes launch status {plan.name}")
    return ExitCode.DONE


def _warn(plan: JobPlan, profile: SiteProfile, prefetch: str) -> None:
    """Say what the plan warns of, and which models are not here yet, where the jobs cannot fetch
    them.

    Args:
        prefetch: the command that fetches everything.
    """
    from recipes_lib.slurm.prefetching import missing_models

    for warning in plan.warnings:
        say(f"warning: {warning}")
    missing = missing_models(plan.models) if profile.values.offline else []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        say(
            f"warning: {' and '.join(missing)} {verb} not on this machine, and jobs have no"
            f" network: {prefetch}"
        )


def _show(plan: JobPlan, profile: SiteProfile) -> None:
    """Print the sbatch line of each job, and what its script asks for and runs."""
    from recipes_lib.slurm.submission import dry_run

    for line, job, script in dry_run(plan, profile):
        shape = job.shape
        unit = "GPU" if shape.gpus and profile.values.gres else "process"
        arms = f"{len(job.tasks)} arms, each " if job.is_array else ""
        say(f"# {job.label}: {arms}{shape.nodes} node x {shape.processes} {unit}")
        say(f"$ {line}")
        for text in (
            *script.directives,
            *(text for text in script.commands if not text.startswith("#")),
        ):
            say("    " + text.replace("\n", "\n    "))
