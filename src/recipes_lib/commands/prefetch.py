"""`recipes prefetch RECIPE|STUDY|EVAL...`: fetch models, data and judges on the login node, and
find them again without a network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.config.loader import load_document
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
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RECIPE|STUDY|EVAL",
        help="what will run on nodes without a network",
    )
    parser.add_argument(
        "--profile", metavar="P", help="the site: its directories hub and cache are filled"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fetch nothing; only look whether everything is here (exit 5 if not)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code of lm-eval tasks, if the eval recipe asks for it too",
    )


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

    found = (
        need
        for word in words
        for need in prefetch_needs(word, _meant_for(word, words, overrides), args.trust_remote_code)
    )
    needs = list(dict.fromkeys(found))
    if args.check:
        missing = _failures(
            needs, lambda need: say(f"here: {need.kind} {need.name}: {need.check()}")
        )
        here = (
            f"{len(needs) - missing} of {len(needs)} here, found"
            if missing
            else f"all {len(needs)} here,"
        )
        say(f"{here} without a network")
        return ExitCode.ENVIRONMENT if missing else ExitCode.DONE
    missing = _failures(needs, _fetch)
    if missing:
        say(f"{len(needs) - missing} of {len(needs)} fetched")
        return ExitCode.ENVIRONMENT
    command = [sys.executable, "-m", "recipes_lib.cli", "prefetch", *words, *overrides, "--check"]
    command += ["--trust-remote-code"] if args.trust_remote_code else []
    code = subprocess.run(command, env={**os.environ, **OFFLINE}).returncode
    if code == ExitCode.DONE:
        first = next((word for word in words if not _is_eval(word)), None)
        next_step(
            f"recipes launch {first} --profile {args.profile or 'P'}"
            if first
            else f"recipes eval {' '.join(words)} RUN"
        )
    return code


def _meant_for(word: str, words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the overrides of one file: beside a recipe, an eval recipe takes those of its own
    sections and the recipe the others.
    """
    if len({_is_eval(one) for one in words}) == 1:
        return list(overrides)
    own = _is_eval(word)
    return [
        override
        for override in overrides
        if (override.removeprefix("--").partition(".")[0] in _EVAL_SECTIONS) == own
    ]


def _is_eval(word: str) -> bool:
    return Path(word).is_file() and load_document(word).kind.name == "eval"


def _fetch(need: Need) -> None:
    say(f"{need.kind} {need.name}")
    need.fetch()


def _failures(needs: Sequence[Need], action: Callable[[Need], object]) -> int:
    """Do something with every need, say what fails in a line each, and return how many did."""
    failures = 0
    for need in needs:
        try:
            action(need)
        except RecipesError as error:
            failures += 1
            print_error(error)
        except Exception as error:  # datasets and lm-eval have exceptions of their own
            failures += 1
            lines = str(error).strip().splitlines() or [type(error).__name__]
            print_error(
                RecipesError(
                    f"missing: {need.kind} {need.name}: {lines[0]}",
                    "where there is a network: recipes prefetch",
                )
            )
    return failures
