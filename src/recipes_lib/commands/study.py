"""`recipes study plan|run|status|report STUDY`: variants compared. Only `run` and `report` import
what is heavy.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from contextlib import nullcontext

from recipes_lib.analysis.text import count
from recipes_lib.commands import at_least, flag_words
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json, say
from recipes_lib.study.config import Study, load_study
from recipes_lib.study.run import StudyRunner, refuse_unmet, study_lock
from recipes_lib.study.runs import study_folder
from recipes_lib.study.status import status_lines, status_rows, study_plan_lines, study_plan_object
from recipes_lib.study.tune import with_choices

_ACTIONS = {
    "plan": "what is to be done and what it takes; nothing is touched",
    "run": "train, evaluate and report what is not done yet; the same command continues",
    "status": "every training and result that is not done",
    "report": "the report of what was measured, without training or evaluating anything",
}


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
        if name != "run":
            add("--json", action="store_true", help="print one JSON object")
        if name == "report":
            gate = "exit code 1 if an arm is worse than its baseline, 6 if results are missing"
            add("--gate", action="store_true", help=f"for CI, without a report: {gate}")
        if name == "run":
            jobs = "trainings at the same time, each with GPUs of its own (default 1)"
            add("--jobs", type=at_least(1), default=1, metavar="N", help=jobs)
            no_train = "train nothing: evaluate what is trained, and report"
            add("--no-train", action="store_true", help=no_train)
            trust = "allow code that ships with a model, if the recipe asks for it"
            add("--trust-remote-code", action="store_true", help=trust)


def run(args: argparse.Namespace) -> int:
    """Load the study, print its warnings, and do the action."""
    study = with_choices(load_study(args.study, args.overrides))
    actions = {"plan": _plan, "run": _run, "status": _status, "report": _report}
    return actions[args.action](study, args)


def typed(study: Study) -> str:
    """Return the study as it is typed on the command line, with its words."""
    return shlex.join([shown_path(study.path), *study.words])


def _plan(study: Study, args: argparse.Namespace) -> int:
    refuse_unmet(study)
    if args.json:
        return print_json(study_plan_object(study))
    for line in study_plan_lines(study):
        say(line)
    next_step(f"recipes study run {typed(study)}")
    return ExitCode.DONE


def _run(study: Study, args: argparse.Namespace) -> int:
    started = time.monotonic()
    flags = flag_words(args, ("trust_remote_code",))
    code = StudyRunner(study, say, args.jobs, flags, not args.no_train, args.debug).run()
    if code not in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        say(f"\nstudy '{study.name}' took {time.monotonic() - started:.0f} s")
        folder = study_folder(study)
        for sentence in (object_or_none(folder / "comparison.json") or {}).get("answer", []):
            say(sentence)
        if (folder / "report" / "report.html").is_file():
            say(f"report: {shown_path(folder / 'report' / 'report.html')}")
    next_step(f"recipes study {'run' if code else 'report'} {typed(study)}")
    return code


def _status(study: Study, args: argparse.Namespace) -> int:
    rows = status_rows(study)
    if args.json:
        return print_json({"study": study.name, "rows": [vars(row) for row in rows]})
    for line in status_lines(rows):
        say(line)
    done = all(row.state == "done" for row in rows)
    next_step(f"recipes study {'report' if done else 'run'} {typed(study)}")
    return ExitCode.DONE


def _report(study: Study, args: argparse.Namespace) -> int:
    from recipes_lib.analysis.summary import conclusion_lines
    from recipes_lib.study.report import report_study

    if args.gate:
        return _gate(study, args)
    folder = study_folder(study)
    kept = not folder.is_dir() or os.access(folder, os.W_OK)
    with study_lock(study) if kept else nullcontext():
        conclusion, missing = report_study(study, keep=kept)
    if args.json:
        return print_json(conclusion.to_dict())
    say("\n".join(conclusion_lines(conclusion)))
    page = shown_path(folder / "report" / "report.html")
    say(f"\nreport: {page}" if kept else f"\n{shown_path(folder)} is read-only: no report")
    next_step(f"recipes study {'run' if missing else 'status'} {typed(study)}")
    return ExitCode.DONE


def _gate(study: Study, args: argparse.Namespace) -> int:
    from recipes_lib.study.report import gate

    answer = gate(study)
    if args.json:
        print_json(answer.to_dict())
        return answer.code
    for word, lines in (
        ("missing", answer.missing),
        ("worse", answer.worse),
        ("not shown within its margin", answer.not_shown),
    ):
        for line in lines:
            say(f"{word}: {line}")
    worse, not_shown = len(answer.worse), len(answer.not_shown)
    if answer.missing:
        last = f"not decided: {count(len(answer.missing), 'result')} missing"
    elif answer.code:
        last = f"failed: {worse} worse than {study.baseline}, {not_shown} not shown within a margin"
    else:
        held = f", and all hold {', '.join(answer.margins)}" if answer.margins else ""
        last = f"passed: no arm is shown to be worse than {study.baseline}{held}"
    say(f"{last} ({count(answer.comparisons, 'comparison')})")
    next_step(f"recipes study {'run' if answer.missing else 'report'} {typed(study)}")
    return answer.code
