"""`recipes export RUN --to DIR`: a folder to give away, and to the Hub if asked."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.weights.export import check_repo, export, push
from recipes_lib.weights.runs import finished_run


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a finished run: LoRA, QLoRA or full fine-tuning")
    folder = "the folder; it must not exist, or be empty"
    add("--to", required=True, metavar="DIR", help=folder)
    merged = "the merged model (recipes merge RUN) instead of the adapter"
    add("--merged", action="store_true", help=merged)
    add("--push-to-hub", metavar="REPO", help="OWNER/NAME: export, and upload the folder")
    public = "make a new repository public (default: private)"
    add("--public", action="store_true", help=public)


def run(args: argparse.Namespace) -> int:
    """Export, and push if asked; no model is loaded."""
    if args.push_to_hub:
        check_repo(args.push_to_hub)
    trained = finished_run(open_run(args.run), remote_code=True)
    files = export(trained, Path(args.to), args.merged)
    size = sum(file.stat().st_size for file in files)
    say(f"exported {len(files)} files, {size / 2**20:,.1f} MiB: {args.to}")
    for file in files:
        say(f"  {file.name}")
    if args.push_to_hub:
        say(f"pushed: {push(Path(args.to).expanduser(), args.push_to_hub, args.public)}")
    next_step(f"read {args.to}/README.md: how to load and serve it")
    return ExitCode.DONE
