"""The judge that an evaluation expects on its own machine: on a compute node nobody started it, so
the job does.

vLLM lives in an environment of its own (the profile's `vllm`); launch/with_judge.sh starts it
beside the evaluation.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root
from recipes_lib.slurm.profile import SiteProfile
from recipes_lib.suites.recipe import EvalRecipe

# share of the GPU's memory, where the same job answers with the model that is judged
BESIDE_A_MODEL = "0.45"


def with_judge(
    evals: Sequence[EvalRecipe], profile: SiteProfile | None, *, alone: bool
) -> tuple[str, ...]:
    """Return the words before a command that asks the judges of some evals; empty where none is to
    be started.

    Args:
        alone: whether the command loads no other model onto the GPU.

    Raises:
        RecipeError: one job would need two servers.
    """
    served = {
        recipe.judge.judge.model: recipe.judge
        for recipe in evals
        if recipe.judge and recipe.judge.judge.served_here
    }
    if not served or profile is None or profile.values.vllm is None:
        return ()
    if len(served) > 1:
        raise RecipeError(
            f"one job would have to serve two judges: {', '.join(served)}",
            "give the evals one judge, or judge in the job: judge.engine",
        )
    model, file = next(iter(served.items()))
    words = [
        "bash",
        str(project_root() / "launch" / "with_judge.sh"),
        model,
        "--max-model-len",
        str(file.judge.max_context_tokens),
    ]
    words += ["--revision", file.judge.revision] if file.judge.revision else []
    words += [] if alone else ["--gpu-memory-utilization", BESIDE_A_MODEL]
    return (*words, "--")


def judges_nobody_starts(evals: Sequence[EvalRecipe], profile: SiteProfile | None) -> list[str]:
    """Return a warning for each judge that is expected on the compute node and that no job will
    start.
    """
    vllm = profile.values.vllm if profile else None
    if profile is None or (vllm and shutil.which(Path(vllm).expanduser())):
        return []
    names: dict[str, list[str]] = {}
    for recipe in evals:
        if recipe.judge and recipe.judge.judge.served_here:
            names.setdefault(str(recipe.judge.judge.base_url), []).append(recipe.name)
    remedy = "set vllm in the profile, or let the job judge by itself (judge.engine: transformers)"
    if vllm:
        remedy = f"there is no {vllm} here (python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm)"
    return [
        f"no job starts the judge that {' and '.join(found)}"
        f" {'expects' if len(found) == 1 else 'expect'} at {url}: {remedy}"
        for url, found in names.items()
    ]
