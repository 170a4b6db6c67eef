"""`recipes export RUN --to DIR`: a folder to give away, and with `--push-to-hub REPO` a
repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.weights.check import NUM_PROMPTS
from recipes_lib.weights.export import check_repo, check_target, export, push
from recipes_lib.weights.finished_run import TRUST, finished_run
from recipes_lib.weights.verify import verify


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a finished run: LoRA, QLoRA or full fine-tuning")
    folder = "the folder; it must not exist, or be empty"
    add("--to", required=True, metavar="DIR", help=folder)
    merged = "the merged model (recipes merge RUN) instead of the adapter"
    add("--merged", action="store_true", help=merged)
    push = "OWNER/NAME: verify the run, export, and upload the folder"
    add("--push-to-hub", metavar="REPO", help=push)
    add("--trust-remote-code", action="store_true", help=TRUST)
    public = "make a new repository public (default: private)"
    add("--public", action="store_true", help=public)


def run(args: argparse.Namespace) -> int:
    """Export, and push if asked."""
    if args.push_to_hub:
        check_repo(args.push_to_hub)
    loads_nothing = not args.push_to_hub
    trained = finished_run(open_run(args.run), args.trust_remote_code or loads_nothing)
    quiet_libraries()
    check_target(Path(args.to), trained)
    if args.push_to_hub:
        say("verifying the run before it is pushed ...")
        result = verify(trained, NUM_PROMPTS)
        if not result.passed:
            raise RecipesError(
                f"not pushed: {result.problems[0]}", f"recipes verify {trained.run.name}"
            )
    files = export(trained, Path(args.to), args.merged)
    size = sum(file.stat().st_size for file in files)
    say(f"exported {len(files)} files, {size / 2**20:,.1f} MiB: {args.to}")
    for file in files:
        say(f"  {file.relative_to(Path(args.to).expanduser().resolve())}")
    if args.push_to_hub:
        say(f"pushed: {push(Path(args.to).expanduser(), args.push_to_hub, args.public)}")
    next_step(f"read {args.to}/README.md before you give it away")
    return ExitCode.DONE
