"""`recipes verify RUN`: are the weights on the disk what was trained, and does the merged model
answer like the adapter?
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from recipes_lib.commands.merge import merge_sentence
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say, say_json
from recipes_lib.weights.check import NUM_PROMPTS
from recipes_lib.weights.finished_run import TRUST, finished_run
from recipes_lib.weights.verify import verify


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a finished run: LoRA, QLoRA or full fine-tuning")
    rows = f"rows to compare on (default {NUM_PROMPTS})"
    add("--prompts", type=int, default=NUM_PROMPTS, metavar="N", help=rows)
    add("--trust-remote-code", action="store_true", help=TRUST)
    printed = "print one JSON object; everything else goes to stderr"
    add("--json", action="store_true", help=printed)


def run(args: argparse.Namespace) -> int:
    """Print what was found; exit 1 when it fails."""
    if args.prompts < 1:
        raise RecipeError(f"--prompts must be 1 or more, not {args.prompts}")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        trained = finished_run(open_run(args.run), args.trust_remote_code)
        quiet_libraries()
        result = verify(trained, args.prompts)
    code = ExitCode.DONE if result.passed else ExitCode.FAILED
    if args.json:
        say_json(result.as_dict())
        return code
    say(f"{result.run}: {result.kind}")
    for fact in result.facts:
        say(f"  {fact}")
    merged = result.numbers.get("merged")
    if merged:
        against = f"against {merged['compared']} in {merged['dtype']}"
        say(f"adapter on its base, {against}, {merge_sentence(merged)}")
    for problem in result.problems:
        say(f"FAILED: {problem}")
    if result.passed:
        keeps = ", and merging keeps what they do" if merged else ""
        say(f"verified: these are the trained weights{keeps}")
        next_step(f"recipes export {args.run} --to DIR")
    return code
