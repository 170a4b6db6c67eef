"""`recipes import FILE... --as RUN`: another program's answers, judgments, benchmarks and logs as a
run of ours.
"""

from __future__ import annotations

import argparse
import json

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.terminal import next_step, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=(
            "judgments (original study, FastChat, alpaca_eval), answers, lm_eval results and"
            " samples, trainer logs, adapter_config.json"
        ),
    )
    parser.add_argument(
        "--as", dest="name", required=True, metavar="RUN", help="name of the run to make"
    )
    parser.add_argument(
        "--recipe",
        dest="trained",
        metavar="R",
        help="the recipe that says what was trained, so that its differences can be listed",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="whose rows are meant, where a file holds several models"
    )
    parser.add_argument(
        "--against", metavar="NAME", help="the opponent, where a file compares with several"
    )
    parser.add_argument("--replace", action="store_true", help="write an imported run anew")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Import the files, and say what became of each and what they do not hold."""
    from recipes_lib.foreign.run import import_run

    done = import_run(
        args.files,
        args.name,
        args.trained,
        model=args.model,
        against=args.against,
        replace=args.replace,
    )
    if args.json:
        shown = {
            "run": done.name,
            "files": done.files,
            "lacks": done.lacks,
            "warnings": done.warnings,
            "there_already": done.there_already,
        }
        print(json.dumps(shown, indent=2))
        return int(ExitCode.DONE)
    if done.there_already:
        say(f"run '{done.name}' was imported from these files already: nothing to do")
    else:
        say(f"run '{done.name}', imported")
    for file in done.files:
        say(f"  {file['file']} ({file['format']}, {file['rows']} rows) -> {file['becomes']}")
    for lack in done.lacks:
        say(f"  not carried over: {lack}")
    for warning in done.warnings:
        say(f"  ! {warning}")
    next_step(f"recipes compare {done.name} OTHER_RUN")
    return int(ExitCode.DONE)
