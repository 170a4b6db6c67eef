"""`recipes export RUN --to DIR`: a folder to give away, and with `--push-to-hub REPO` a
repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.weights.check import NUM_PROMPTS
from recipes_lib.weights.export import check_repo, check_target, export, push
from recipes_lib.weights.finished_run import finished_run
from recipes_lib.weights.verify import verify

if TYPE_CHECKING:
    from recipes_lib.weights.finished_run import TrainedRun


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "run", metavar="RUN", help="a finished run: LoRA, QLoRA or full fine-tuning"
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="the folder; it must not exist, or be empty"
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="the merged model (recipes merge RUN) instead of the adapter",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="OWNER/NAME: verify the run, export, and upload the folder",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code that ships with the model, if the run's recipe asks for it too",
    )
    parser.add_argument(
        "--public", action="store_true", help="make a new repository public (default: private)"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and push if asked."""
    if args.push_to_hub:
        check_repo(args.push_to_hub)
    loads_nothing = not args.push_to_hub
    trained = finished_run(open_run(args.run), args.trust_remote_code or loads_nothing)
    quiet_libraries()
    check_target(Path(args.to), trained)
    if args.push_to_hub:
        _verify(trained)
    files = export(trained, Path(args.to), args.merged)
    size = sum(file.stat().st_size for file in files)
    say(f"exported {len(files)} files, {size / 2**20:,.1f} MiB: {args.to}")
    for file in files:
        say(f"  {file.relative_to(Path(args.to).expanduser().resolve())}")
    if args.push_to_hub:
        say(f"pushed: {push(Path(args.to).expanduser(), args.push_to_hub, args.public)}")
    next_step(f"read {args.to}/README.md before you give it away")
    return ExitCode.DONE


def _verify(trained: TrainedRun) -> None:
    """Push nothing that does not pass `recipes verify`."""
    say("verifying the run before it is pushed ...")
    result = verify(trained, NUM_PROMPTS)
    if not result.passed:
        raise RecipesError(
            f"not pushed: {result.problems[0]}", f"recipes verify {trained.run.name}"
        )
