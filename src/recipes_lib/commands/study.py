"""`recipes study plan|run|status|report|gate|diff STUDY`: variants compared. Only `run`, `report`
and `gate` import what is heavy.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from contextlib import nullcontext, suppress

from recipes_lib.compare.design import Study, load_study
from recipes_lib.compare.wording import count
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.json_files import read_object
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import aligned, flag_words, next_step, print_json, say
from recipes_lib.slurm.submission import LaunchFolder
from recipes_lib.slurm.watching import goes_on
from recipes_lib.study.arms import study_folder
from recipes_lib.study.leaks import refuse_leaks
from recipes_lib.study.runner import run_study, study_lock
from recipes_lib.study.status import (
    diff_rows,
    number_of_looks,
    standstill,
    status_lines,
    step_rows,
    study_plan_lines,
    study_plan_object,
    summary_line,
    tuning_lines,
)
from recipes_lib.study.steps import build_graph
from recipes_lib.study.tuning import with_choices

_ACTIONS = {
    "plan": "what would be done, why, and what it costs; nothing is touched",
    "run": "do every step that is not fresh; the same command continues after any interruption",
    "status": "every step with its state",
    "report": "statistics and report of what was measured, without training or evaluating anything",
    "gate": "for CI: exit code 1 if an arm is worse than its baseline, 6 if results are missing",
    "diff": "what differs between the arms, and whether a factor declares it",
}
WATCH_S = 2.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    parser.epilog = (
        "section.key=value words override a value in every arm's recipe; key=value words the"
        " study's own (seeds=[1,2], gpus=2)"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    for name, help in _ACTIONS.items():
        add = actions.add_parser(name, help=help, allow_abbrev=False).add_argument
        add("study", metavar="STUDY", help="a study file, or the name of one in recipes/studies/")
        if name in ("plan", "status", "gate"):
            add("--json", action="store_true", help="print one JSON object")
        if name == "status":
            watch = "show it again every two seconds until everything is done, or nothing goes on"
            add("--watch", action="store_true", help=watch)
        if name == "run":
            jobs = "trainings at the same time (default 1)"
            add("--jobs", type=int, default=1, metavar="N", help=jobs)
            anyway = "train also what the plan says cannot fit this machine"
            add("--no-plan", action="store_true", help=anyway)
            trust = "allow code that ships with a model, if the recipe asks for it"
            add("--trust-remote-code", action="store_true", help=trust)
            add("--dry-run", action="store_true", help="the same as plan")
        if name in ("run", "plan"):
            only = "these steps alone, by name or its beginning: train"
            add("--only", nargs="+", default=[], metavar="STEP", help=only)


def run(args: argparse.Namespace) -> int:
    """Load the study, print its warnings, and do the action."""
    study = with_choices(load_study(args.study, args.overrides))
    for warning in study.warnings:
        print_error(warning)
    if args.action == "run" and args.dry_run:
        args.action, args.json = "plan", False
    actions = {
        "plan": _plan,
        "run": _run,
        "status": _status,
        "report": _report,
        "gate": _gate,
        "diff": _diff,
    }
    return actions[args.action](study, args)


def typed(study: Study) -> str:
    """Return the study as it is typed on the command line, with its words."""
    return shlex.join([shown_path(study.path), *study.words])


def _plan(study: Study, args: argparse.Namespace) -> int:
    graph = build_graph(study)
    steps = graph.wanted(args.only)
    refuse_leaks(study, graph.todo(args.only))
    if args.json:
        return print_json(study_plan_object(study, graph, steps, _estimates(study)))
    for line in study_plan_lines(study, graph, steps, _estimates(study)):
        say(line)
    say("estimated times and memory, and where they come from: recipes plan " + typed(study))
    next_step(f"recipes study run {typed(study)}")
    return ExitCode.DONE


def _estimates(study: Study) -> dict[str, str]:
    """What one training of each arm takes, as `recipes plan` estimates it; nothing for arms it
    cannot plan.
    """
    from recipes_lib.planning.text import spread
    from recipes_lib.study.hours import study_hours

    with suppress(RecipesError):
        plans = {
            name: plan
            for arm in study_hours(study).arms
            for name, plan in {arm.name: arm.plan, **arm.tuning}.items()
        }
        return {
            name: (
                f"about {spread(plan.duration.total, plan.settings.device)} on"
                f" {plan.card.title}{' (assumed)' * plan.card.stands_in}"
            )
            for name, plan in plans.items()
        }
    return {}


def _run(study: Study, args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise RecipeError(f"--jobs must be at least 1, got {args.jobs}")
    started = time.monotonic()
    flags = flag_words(args, ("no_plan", "trust_remote_code"))
    code = run_study(study, say, args.jobs, args.only, args.debug, flags)
    if code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        next_step(f"recipes study run {typed(study)}")
        return code
    took = f"{time.monotonic() - started:.0f} s"
    say(
        f"\nstudy '{study.name}'" + (f" took {took}" if code else f": every step is fresh ({took})")
    )
    report = study_folder(study) / "report" / "report.html"
    if report.is_file():
        # The report's answer, as it was written.
        comparison = read_object(study_folder(study) / "steps" / "statistics" / "comparison.json")
        for sentence in comparison.get("answer", []):
            say(sentence)
        for part in ("looks", "relabelling"):
            if own := comparison.get(part):
                say(own["sentence"])
        say(f"report: {shown_path(report)}")
    next_step(f"recipes study {'status' if code else 'diff'} {typed(study)}")
    return code


def _status(study: Study, args: argparse.Namespace) -> int:
    shown = ""
    while True:
        graph = build_graph(study)
        rows, looks = step_rows(study, graph), number_of_looks(study)
        if args.json:
            steps = [row.to_dict() for row in rows]
            return print_json({"study": study.name, "looks": looks, "steps": steps})
        terminal = sys.stdout.isatty()
        if args.watch and terminal:
            print("\x1b[H\x1b[2J", end="")
        if terminal or not shown:
            width = shutil.get_terminal_size((160, 24)).columns if terminal else 10_000
            for line in status_lines(rows, width):
                say(line)
        if (summary := summary_line(rows, looks)) != shown or terminal:
            say(summary)
        shown = summary
        done = all(row.state == "fresh" for row in rows)
        if not args.watch or done:
            break
        still = standstill(study, graph)
        if still and not goes_on(LaunchFolder(study_folder(study) / "slurm")):
            say(still)
            break
        time.sleep(WATCH_S)
    next_step(f"recipes study {'report' if done else 'run'} {typed(study)}")
    return ExitCode.DONE


def _report(study: Study, args: argparse.Namespace) -> int:
    from recipes_lib.study.conclusion import conclude

    folder = study_folder(study)
    kept = not folder.is_dir() or os.access(folder, os.W_OK)
    with study_lock(study) if kept else nullcontext():
        conclusion = conclude(study, build_graph(study), keep=kept)
    comparison = conclusion.comparison
    for sentence in comparison.answer:
        say(sentence)
    if looks := comparison.looks:
        say(looks.sentence)
    if own := comparison.relabelling:
        say(own.sentence)
    if not kept:
        say(f"\n{shown_path(folder)} is read-only: no report was written")
        return ExitCode.DONE
    if not conclusion.complete:
        say("not everything is measured yet: the report holds what there is")
    say(f"\nreport: {shown_path(conclusion.folder / 'report.html')}")
    next_step(f"recipes study {'diff' if conclusion.complete else 'run'} {typed(study)}")
    return ExitCode.DONE


def _gate(study: Study, args: argparse.Namespace) -> int:
    from recipes_lib.study.gate import gate

    found = gate(study, build_graph(study))
    if args.json:
        print_json(found.to_dict())
        return found.code
    for line in found.missing:
        say(f"missing: {line}")
    for one in found.worse:
        say(f"worse: {one.sentence}")
    for one in found.not_shown:
        say(f"not shown within its margin: {one.sentence}")
    if found.unrecorded:
        say(f"this look could not be recorded: {found.unrecorded}")
    if found.missing:
        last = f"not decided: {count(len(found.missing), 'result')} missing"
    elif found.code:
        last = (
            f"failed: {len(found.worse)} worse than {found.baseline}, {len(found.not_shown)} not"
            " shown within a margin"
        )
    else:
        held = f", and all hold {', '.join(found.margins)}" if found.margins else ""
        last = f"passed: no arm is shown to be worse than {found.baseline}{held}"
    say(f"{last} ({count(found.comparisons, 'comparison')})")
    next_step(f"recipes study {'run' if found.missing else 'report'} {typed(study)}")
    return found.code


def _diff(study: Study, args: argparse.Namespace) -> int:
    arms = [arm.name for arm in study.arms if arm.recipe is not None]
    rows = list(diff_rows(study))
    without = [arm.name for arm in study.arms if arm.recipe is None]
    if rows:
        lines = [(key, *values, factor or "none declared") for key, values, factor in rows]
        say("\n".join(aligned([("key", *arms, "factor"), *lines])))
    elif len(arms) > 1:
        say("no difference: every resolved value is the same in all arms")
    else:
        say("there are no two arms with a recipe")
    for line in tuning_lines(study):
        say(line)
    confounds = [key for key, _, factor in rows if not factor]
    if confounds:
        say(
            f"\n{len(confounds)} of {len(rows)} differences belong to no declared factor: each may"
            " be the cause of what is measured"
        )
    if without:
        say(f"without a recipe, so nothing is known of how they were made: {', '.join(without)}")
    refuse_leaks(study, build_graph(study).wanted())
    next_step(f"recipes study plan {typed(study)}")
    return ExitCode.DONE
