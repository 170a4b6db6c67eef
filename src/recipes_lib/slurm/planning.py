"""From what was typed to a plan: is it a recipe or a study, how is it launched, how long may it
take.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes_lib.compare.design import load_study, study_file
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.launch import Launch, plan_launch_of
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import RecipeError, RecipesError
from recipes_lib.core.project import recipe_path
from recipes_lib.planning.cards import card_named
from recipes_lib.planning.plan import plan_launched
from recipes_lib.slurm.folder import launch_folder
from recipes_lib.slurm.profile import SiteProfile
from recipes_lib.slurm.recipe_jobs import JobPlan, named_evals, plan_recipe_jobs, read_stages
from recipes_lib.slurm.study_jobs import plan_study_jobs


def plan_target(
    target: str,
    overrides: Sequence[str],
    profile: SiteProfile | None,
    args: argparse.Namespace,
    flags: Sequence[str],
) -> JobPlan:
    """Return the jobs of a recipe or a study.

    Args:
        flags: options of the training script.

    Raises:
        RecipeErrors: what is wrong with the recipe, the study, the launch or the stages.
    """
    stages = read_stages(args.stages)
    if recipe_path(target).is_dir():
        raise RecipeError(
            "is a folder; launch one recipe or study of it", "all recipes: recipes ls", file=target
        )
    study = study_file(target)
    if study is not None:
        return _plan_study(study, overrides, profile, args, flags, stages)
    if args.prepare and args.stages is None and profile is None:
        stages = ("train",)  # what somebody submits by hand comes first
    recipe = load_recipe(target, overrides)
    launch = plan_launch_of(recipe, args.accelerate, args.gpus, args.nodes)
    accumulation_steps(recipe, launch.world_size)
    _check_gpus(launch, profile)
    return plan_recipe_jobs(
        recipe,
        launch,
        launch_folder(recipe.name),
        profile,
        stages=stages,
        evals=named_evals(args.evals, recipe) if "eval" in stages else [],
        words=[*overrides, *flags],
        seconds=planned_seconds(recipe, launch, profile),
    )


def planned_seconds(recipe: Recipe, launch: Launch, profile: SiteProfile | None) -> int | None:
    """Return the time limit that a plan gives for the site's card; None where no card is named or
    nothing is known of the model.
    """
    card = profile.values.gpu if profile else None
    if card is None or launch.config.use_cpu:
        return None

    try:
        return plan_launched(recipe, launch, card_named(card)).walltime
    except RecipesError:
        return None


def _plan_study(
    path: Path,
    overrides: Sequence[str],
    profile: SiteProfile | None,
    args: argparse.Namespace,
    flags: Sequence[str],
    stages: Sequence[str],
) -> JobPlan:
    if args.evals:
        raise RecipeError("--evals is for recipes: a study names its evals itself")
    own = {key: getattr(args, key) for key in ("accelerate", "gpus", "nodes")}
    study = load_study(
        path, [*overrides, *(f"{key}={value}" for key, value in own.items() if value is not None)]
    )
    for arm in study.arms:
        if arm.trained:
            _check_gpus(arm.launch, profile)
    limit = args.throttle or (profile.values.max_concurrent_arms if profile else None)
    seconds = {
        arm.name: planned_seconds(arm.recipe, arm.launch, profile)
        for arm in study.arms
        if arm.trained and arm.recipe
    }
    known = {name: value for name, value in seconds.items() if value is not None}
    return plan_study_jobs(
        study,
        launch_folder(study.name),
        profile,
        stages=stages,
        flags=flags,
        throttle=limit,
        seconds=known,
    )


def _check_gpus(launch: Launch, profile: SiteProfile | None) -> None:
    """Refuse a launch that needs GPUs on a cluster that has none.

    Raises:
        RecipeError: with the CPU twins to take instead.
    """
    if profile is not None and profile.values.gres is None and not launch.config.use_cpu:
        raise profile.error(
            "gres",
            f"this cluster has no GPUs (gres is null), and {launch.config.path.stem} needs them",
            "take a CPU config: --accelerate cpu, or ddp_cpu or fsdp_cpu for several processes",
        )
