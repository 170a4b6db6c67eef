"""`recipes prefetch RECIPE|STUDY|EVAL...`: fetch models, data and judges on the login node, and
find them again without a network.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.config.documents import read
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, print_error
from recipes_lib.core.terminal import next_step, say
from recipes_lib.slurm.profile import load_profile

if TYPE_CHECKING:
    from recipes_lib.slurm.prefetching import Need

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
_EVAL_SECTIONS = ("suite", "generation", "judge", "metrics")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    what = "what will run on nodes without a network"
    add("words", nargs="+", metavar="RECIPE|STUDY|EVAL", help=what)
    profile = "the site: its directories hub and cache are filled"
    add("--profile", metavar="P", help=profile)
    check = "fetch nothing; only look whether everything is here (exit 5 if not)"
    add("--check", action="store_true", help=check)
    trust = "allow code of lm-eval tasks, if the eval recipe asks for it too"
    add("--trust-remote-code", action="store_true", help=trust)


def run(args: argparse.Namespace) -> int:
    """Fetch, then check in a process of its own that is told to stay offline, as a job on a compute
    node is.
    """
    words = [word for word in args.words if "=" not in word]
    overrides = [*(word for word in args.words if "=" in word), *args.overrides]
    if not words:
        raise RecipeError(
            "recipes prefetch: nothing is named",
            "recipes prefetch RECIPE evals/alpaca_eval.yaml --profile P",
        )
    if args.profile:
        load_profile(args.profile).enter()
    if args.check:
        os.environ |= OFFLINE  # before the Hub's libraries are imported, which read it once
    from recipes_lib.slurm.prefetching import prefetch_needs

    needs: dict[Need, None] = {}
    for word in words:
        meant = _meant_for(word, words, overrides)
        needs |= dict.fromkeys(prefetch_needs(word, meant, args.trust_remote_code))
    action = _look if args.check else _fetch
    missing = sum(not _done(action, need) for need in needs)
    there = f"{len(needs) - missing} of {len(needs)}"
    if args.check:
        here = f"{there} here, found" if missing else f"all {len(needs)} here,"
        say(f"{here} without a network")
    elif missing:
        say(f"{there} fetched")
    if missing or args.check:
        return ExitCode.ENVIRONMENT if missing else ExitCode.DONE
    command = [sys.executable, "-m", "recipes_lib.cli", "prefetch", *words, *overrides, "--check"]
    command += ["--trust-remote-code"] if args.trust_remote_code else []
    code = subprocess.run(command, env={**os.environ, **OFFLINE}).returncode
    if code == ExitCode.DONE:
        first = next((word for word in words if not _is_eval(word)), None)
        launch = f"recipes launch {first} --profile {args.profile or 'P'}"
        next_step(launch if first else f"recipes eval {shlex.join(words)} RUN")
    return code


def _meant_for(word: str, words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the overrides of one file: beside a recipe, an eval recipe takes those of its own
    sections and the recipe the others.
    """
    if len({_is_eval(one) for one in words}) == 1:
        return list(overrides)
    sections = [override.removeprefix("--").partition(".")[0] for override in overrides]
    own = _is_eval(word)
    return [
        override
        for override, section in zip(overrides, sections, strict=True)
        if (section in _EVAL_SECTIONS) == own
    ]


def _is_eval(word: str) -> bool:
    return Path(word).is_file() and read(word).kind == "eval"


def _look(need: Need) -> None:
    say(f"here: {need.kind} {need.name}: {need.check()}")


def _fetch(need: Need) -> None:
    say(f"{need.kind} {need.name}")
    need.fetch()


def _done(action: Callable[[Need], None], need: Need) -> bool:
    """Do something with a need, and return whether it could be done; say in a line why not."""
    try:
        action(need)
        return True
    except RecipesError as error:
        print_error(error)
    except Exception as error:  # datasets and lm-eval have exceptions of their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"missing: {need.kind} {need.name}: {lines[0]}"
        print_error(RecipesError(what, "where there is a network: recipes prefetch"))
    return False
