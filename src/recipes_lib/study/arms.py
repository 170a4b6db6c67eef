"""Which runs stand for the arms of a study: their names, and the words that train them. Needs no
torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recipes_lib.config.documents import COMMAND_LINE, Origin
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.study.config import Arm, Study


def study_folder(study: Study) -> Path:
    """Return runs/<study>, where steps, logs and the report lie."""
    return runs_root() / study.name


def arm_run(study: Study, arm: Arm, seed: int | None = None) -> str:
    """Return the run of an arm and one of its seeds: `<study>--<arm>`, for another seed than the
    recipe's `<study>--<arm>--seed<N>`.

    A name depends on no other seed, so that a seed that is added later trains nothing again.
    """
    seed = arm.seeds[0] if seed is None else seed
    return f"{study.name}--{arm.name}" + ("" if seed == arm.own_seed else f"--seed{seed}")


def base_record(study: Study) -> Path:
    """Return the file in which the runner notes the base's run."""
    return study_folder(study) / "base.json"


def base_arm(study: Study) -> Arm | None:
    """Return the arm whose recipe says how the base is asked: the first one without quantization,
    else the first.
    """
    trained = list(study.arms)
    return next(
        (arm for arm in trained if arm.recipe and arm.recipe.base_format is None),
        trained[0] if trained else None,
    )


def arm_recipe(study: Study, arm: Arm, seed: int) -> Recipe:
    """Return the recipe of one arm and one seed."""
    assert arm.recipe is not None
    name, word = arm_run(study, arm, seed), Origin(COMMAND_LINE)
    written = arm.recipe.values
    return dataclasses.replace(
        arm.recipe,
        name=name,
        values={
            **written,
            "run": {**written.get("run", {}), "name": name},
            "train": {**written.get("train", {}), "seed": seed},
        },
        run=arm.recipe.run.model_copy(update={"name": name}),
        train={**arm.recipe.train, "seed": seed},
        origins={**arm.recipe.origins, "run.name": word, "train.seed": word},
    )


def launch_words(arm: Arm) -> list[str]:
    """Return the options of `recipes train` that launch an arm as the study says."""
    launch, config = arm.launch, arm.launch.config
    shipped = config.path.parent.name == "accelerate_configs"
    words = ["--accelerate", config.path.stem if shipped else shown_path(config.path)]
    words += (
        ["--gpus", str(launch.per_machine)] if launch.world_size != config.num_processes else []
    )
    return words + (
        ["--nodes", str(launch.machines)] if launch.machines != config.num_machines else []
    )
