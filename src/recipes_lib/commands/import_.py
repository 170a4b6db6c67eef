"""`recipes import FILE... --as RUN`: another program's answers, judgments, benchmarks and logs as a
run of ours.
"""

from __future__ import annotations

import argparse

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.terminal import next_step, say, say_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    files = (
        "judgments (original study, FastChat, alpaca_eval), answers, lm_eval results and samples,"
        " trainer logs, adapter_config.json"
    )
    add("files", nargs="+", metavar="FILE", help=files)
    add("--as", dest="name", required=True, metavar="RUN", help="name of the run to make")
    recipe = "the recipe that says what was trained, so that its differences can be listed"
    add("--recipe", dest="trained", metavar="R", help=recipe)
    model = "whose rows are meant, where a file holds several models"
    add("--model", metavar="NAME", help=model)
    against = "the opponent, where a file compares with several"
    add("--against", metavar="NAME", help=against)
    add("--replace", action="store_true", help="write an imported run anew")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Import the files, and say what became of each and what they do not hold."""
    from recipes_lib.foreign.run import import_run

    named = {"model": args.model, "against": args.against, "replace": args.replace}
    done = import_run(args.files, args.name, args.trained, **named)
    if args.json:
        keys = ("files", "lacks", "warnings", "there_already")
        return say_json({"run": done.name, **{key: getattr(done, key) for key in keys}})
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
