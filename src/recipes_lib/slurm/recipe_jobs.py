"""The jobs of one recipe: training, then each evaluation, then the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from recipes_lib.config.launch import Launch
from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root, shown_path
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.slurm.folder import LaunchFolder
from recipes_lib.slurm.jobs import Job, JobSize, Task, launcher_of
from recipes_lib.slurm.judge_server import judges_nobody_starts, with_judge
from recipes_lib.slurm.prefetching import judge_model
from recipes_lib.slurm.profile import SiteProfile
from recipes_lib.slurm.sections import STAGES
from recipes_lib.slurm.snapshot import Snapshot
from recipes_lib.suites.recipe import EvalRecipe, load_eval

DEFAULT_EVALS = ("alpaca_eval.yaml", "mt_bench.yaml", "lm_eval.yaml")
TRAIN_MODULE, CLI_MODULE = ("-m", "recipes_lib.train"), ("-m", "recipes_lib.cli")


@dataclass(frozen=True)
class JobPlan:
    """Everything a submission needs: the jobs in order, what they belong to, the files to copy, the
    models they load, what to warn of.

    Args:
        evals: eval recipes that the target does not name itself, for the words of `recipes
            prefetch`.
    """

    name: str
    jobs: tuple[Job, ...]
    folder: LaunchFolder
    snapshot: Snapshot
    models: tuple[ModelSection, ...] = ()
    warnings: tuple[str, ...] = ()
    evals: tuple[str, ...] = ()


def python_in_job(profile: SiteProfile | None) -> tuple[str, ...]:
    """Return the words that start Python inside a job: the container's or environment's `python`,
    else the one that submits.
    """
    environment = profile.values.environment if profile else None
    if environment is None:
        return (sys.executable,)
    brings_one = (
        environment.conda
        or environment.venv
        or environment.container
        or environment.modules
        or environment.setup
        or environment.srun
    )
    return (*environment.container, "python" if brings_one else sys.executable)


def plan_recipe_jobs(
    recipe: Recipe,
    launch: Launch,
    folder: LaunchFolder,
    profile: SiteProfile | None,
    *,
    stages: Sequence[str],
    evals: Sequence[EvalRecipe],
    words: Sequence[str] = (),
    seconds: int | None = None,
) -> JobPlan:
    """Return the jobs of a recipe.

    Args:
        recipe: the recipe, overrides applied.
        evals: what to evaluate on in the stage eval.
        words: overrides and flags that follow the recipe on the training's command line.
        seconds: time limit of the training, from its plan.

    Raises:
        RecipeError: stages without training, of a run that is not finished, or a report of one that
            was not evaluated.
    """
    python = python_in_job(profile)
    snapshot = Snapshot(folder.path / "snapshot")
    snapshot.add_recipe(recipe)
    jobs: list[Job] = []
    allowed = tuple(
        word for word in words if word == "--trust-remote-code"
    )  # every later stage loads the model too
    if "train" in stages:
        snapshot.add_file(launch.config.path)
    if "eval" in stages:
        for one in evals:
            snapshot.add_eval(one)
    if "train" in stages:
        shape = shape_of(launch)
        launcher = launcher_of(python, launch.config, snapshot.shown(launch.config.path), shape)
        script = (*TRAIN_MODULE, snapshot.shown(recipe.path), *words)
        check = (*python, *CLI_MODULE, "verify", recipe.name, *allowed)
        jobs.append(
            Job(
                "train",
                "train",
                (Task(launcher, script, check, recipe.name),),
                shape,
                seconds=seconds,
            )
        )
    else:
        _check_finished(recipe)
    small = JobSize(uses_gpus=not launch.config.use_cpu)
    if "eval" in stages:
        for one in evals:
            command = (*CLI_MODULE, "eval", snapshot.shown(one.path), recipe.name, *allowed)
            after = ("train",) if "train" in stages else ()
            served = with_judge([one], profile, alone=False)
            jobs.append(
                Job(
                    f"eval-{one.name}",
                    "eval",
                    (Task((*served, *python), command, what=one.name),),
                    small,
                    after,
                )
            )
    if "report" in stages:
        page = shown_path(RunDirectory(recipe.name).path / "report.html")
        command = (*CLI_MODULE, "compare", recipe.name, "--html", page)
        last = tuple(job.label for job in jobs if job.stage == "eval") or tuple(
            job.label for job in jobs
        )
        jobs.append(
            Job(
                "report",
                "report",
                (Task(python, command, what="report"),),
                JobSize(uses_gpus=False),
                last,
            )
        )
    evals = evals if "eval" in stages else ()
    warnings = judges_nobody_starts(evals, profile)
    if (
        "report" in stages
        and "eval" not in stages
        and not any(RunDirectory(recipe.name).path.glob("evals/*/result*.json"))
    ):
        if "train" not in stages:
            raise RecipeError(
                f"run '{recipe.name}' has no evaluation to report",
                "add the stage: --stages eval,report",
            )
        warnings.append(
            "no evaluation comes before the report, so it will end with exit code 2: --stages"
            " train,eval,report"
        )
    models = (recipe.model, *(judge for one in evals for judge in judge_model(one)))
    return JobPlan(
        recipe.name,
        tuple(jobs),
        folder,
        snapshot,
        models,
        tuple(warnings),
        tuple(shown_path(one.path) for one in evals),
    )


def shape_of(launch: Launch) -> JobSize:
    """Return the size of a training job."""
    return JobSize(
        launch.machines, launch.per_machine, not launch.config.use_cpu, launch.distributed_type
    )


def read_stages(text: str | None) -> tuple[str, ...]:
    """Return the stages of `--stages train,eval`, in their order.

    Raises:
        RecipeError: an unknown stage, or none.
    """
    if text is None:
        return STAGES
    asked = [word for word in text.split(",") if word]
    unknown = [word for word in asked if word not in STAGES]
    if unknown or not asked:
        raise RecipeError(
            f"--stages: {f'no stage {unknown[0]!r}' if unknown else 'no stage is named'}",
            f"stages: {', '.join(STAGES)}",
        )
    return tuple(stage for stage in STAGES if stage in asked)


def named_evals(paths: Sequence[str] | None, recipe: Recipe) -> list[EvalRecipe]:
    """Return the evals to run: those named, else the small ones for a quickstart recipe and the
    three of evals/ for others.
    """
    folder = project_root() / "evals"
    if recipe.path.resolve().parent.name == "quickstart":
        folder /= "quickstart"
    return [
        load_eval(path) for path in paths or [shown_path(folder / name) for name in DEFAULT_EVALS]
    ]


def _check_finished(recipe: Recipe) -> None:
    run = RunDirectory(recipe.name)
    state = run.read_state()["state"] if run.exists() else "not there"
    if state not in ("finished", "imported"):
        raise RecipeError(
            f"run '{recipe.name}' is {state}, so there is nothing to evaluate",
            "add the stage: --stages train,eval,report",
        )
