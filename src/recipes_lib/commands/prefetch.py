"""`recipes prefetch RECIPE|STUDY|EVAL...`: fetch models, data and judges on the login node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from recipes_lib.config.documents import read
from recipes_lib.core.errors import ExitCode, RecipeError, RecipesError, one_line, print_error
from recipes_lib.core.terminal import next_step, say
from recipes_lib.slurm.profile import load_profile

if TYPE_CHECKING:
    from recipes_lib.slurm.prefetching import Need

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def run(
    words: Annotated[list[str], "recipes, studies and evals for nodes without a network"],
    overrides: Sequence[str],
    *,
    profile: Annotated[str | None, "the site: its directories hub and cache are filled"] = None,
    check: Annotated[bool, "fetch nothing; check that everything is here (exit 5 if not)"] = False,
    trust_remote_code: Annotated[bool, "allow code of lm-eval tasks, if the recipe asks"] = False,
) -> int:
    """Fetch, then check in a process that stays offline, as a job on a compute node does."""
    files = [word for word in words if "=" not in word]
    values = [*(word for word in words if "=" in word), *overrides]
    if not files:
        hint = "recipes prefetch RECIPE evals/alpaca_eval.yaml --profile P"
        raise RecipeError("recipes prefetch: nothing is named", hint)
    if profile:
        load_profile(profile).enter()
    if check:
        os.environ |= OFFLINE  # before the Hub's libraries are imported, which read it once
    from recipes_lib.slurm.prefetching import prefetch_needs

    evals = [file for file in files if Path(file).is_file() and read(file).kind == "eval"]
    trained = [file for file in files if file not in evals]
    needs: dict[Need, None] = {}
    for file in files:
        asked = values if file in trained or not trained else []  # values are the recipe's
        needs |= dict.fromkeys(prefetch_needs(file, asked, trust_remote_code))
    missing = 0
    for need in needs:
        try:
            if not check:
                say(f"{need.kind} {need.name}")
            what = need.look(not check)
            if check:
                say(f"here: {need.kind} {need.name}: {what}")
            continue
        except RecipesError as error:
            print_error(error)
        except Exception as error:  # datasets and lm-eval have exceptions of their own
            what = f"missing: {need.kind} {need.name}: {one_line(error)}"
            print_error(RecipesError(what, "on a machine with a network: recipes prefetch"))
        missing += 1
    if check or missing:
        how = "found without a network" if check else "fetched"
        say(f"{len(needs) - missing} of {len(needs)} {how}")
        return ExitCode.ENVIRONMENT if missing else ExitCode.DONE
    command = [sys.executable, "-m", "recipes_lib.cli", "prefetch", *files, *values, "--check"]
    command += ["--trust-remote-code"] if trust_remote_code else []
    code = subprocess.run(command, env={**os.environ, **OFFLINE}).returncode
    if code:
        return code
    if not trained:
        return next_step("recipes", "eval", *files, "RUN")
    return next_step("recipes", "launch", trained[0], "--profile", profile or "P")
