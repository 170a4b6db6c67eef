"""The trainings of a study: their names, and which are finished with today's settings and data."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from recipes_lib.config.launch import LaunchSection
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import Row, read_rows
from recipes_lib.core.project import project_root, runs_root
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.data.sources import source_hashes
from recipes_lib.study.config import Arm, Study
from recipes_lib.training.resume_guard import differences, recipe_differences

REPLACED = ".replaced"  # folder of runs that were trained again


@dataclass(frozen=True)
class StudyRun:
    """One training of a study: an arm, or one value of its grid, with one seed."""

    study: str
    arm: Arm
    seed: int

    @property
    def run(self) -> str:
        """The name of its run; an added seed changes no other's, and so trains nothing again."""
        name = f"{self.study}--{self.arm.name}"
        if self.seed == self.arm.recipe.train.get("seed", 42):
            return name
        return f"{name}--seed{self.seed}"

    @property
    def state(self) -> Row:
        """What run.json says; empty where there is no run."""
        directory = RunDirectory(self.run)
        if not directory.exists():
            return {}
        return directory.read_state()

    @property
    def error_lines(self) -> list[str]:
        """What run.json says of why it failed; empty where it says nothing."""
        return str(self.state.get("error") or "").splitlines()

    @cached_property
    def recipe(self) -> Recipe:
        """What it is trained with: the arm's recipe with name, seed and launch."""
        recipe = self.arm.recipe
        launch = self.arm.launch
        path = launch.config.path
        name = str(path.resolve())
        if path.parent == project_root() / "accelerate_configs":
            name = path.stem
        section = LaunchSection(accelerate=name, gpus=launch.per_machine, nodes=launch.machines)
        run = recipe.run.model_copy(update={"name": self.run})
        train = recipe.train | {"seed": self.seed}
        return replace(recipe, name=self.run, run=run, train=train, launch=section)


def study_folder(study: Study) -> Path:
    """Return runs/<study>, where logs, records and the report lie."""
    return runs_root() / study.name


def study_trainings(study: Study) -> list[StudyRun]:
    """Return the runs of all arms and seeds, in order."""
    return [StudyRun(study.name, arm, seed) for arm in study.arms for seed in arm.seeds]


def study_tunings(study: Study) -> list[StudyRun]:
    """Return the trainings of the grids that arms choose their values from."""
    trainings: list[StudyRun] = []
    for arm in study.arms:
        for candidate in arm.candidates:
            trainings.append(StudyRun(study.name, candidate, candidate.seeds[0]))
    return trainings


def with_choices(study: Study) -> Study:
    """Return the study with each tuned arm at the value of its lowest loss, the first if equal."""
    arms: list[Arm] = []
    for arm in study.arms:
        tried = study_tunings(replace(study, arms=(arm,)))
        if arm.tuning and all(map(is_trained, tried)):
            losses = [validation_loss(RunDirectory(training.run)) for training in tried]
            tuning = replace(arm.tuning, losses=tuple(losses))
            finite = [loss for loss in losses if loss is not None]
            if finite:
                best = losses.index(min(finite))
                tuning = replace(tuning, chosen=tuning.values[best])
                arm = replace(arm, recipe=arm.candidates[best].recipe)
            arm = replace(arm, tuning=tuning)
        arms.append(arm)
    return replace(study, arms=tuple(arms))


def validation_loss(run: RunDirectory) -> float | None:
    """Return the validation loss of the weights that were kept: of the best step, or the end."""
    summary = run.read_state().get("summary") or {}
    loss = summary.get("last_validation_loss")
    for row in read_rows(run.metrics):
        if "eval_loss" in row and row["step"] == summary.get("best_step"):
            loss = row["eval_loss"]
    if loss is None or not math.isfinite(loss):
        return None
    return float(loss)


def is_trained(training: StudyRun) -> bool:
    """Whether a run is finished, or diverged as a value of a grid, as the study has it now."""
    state = training.state
    ended = state.get("state") == "finished"
    if "--tune-" in training.run and state.get("state") == "failed":
        ended = state.get("exit_code") == ExitCode.NUMERICS
    return ended and not what_changed(training)


def what_changed(training: StudyRun) -> list[str]:
    """Return what of a run is not as the study has it now, a phrase for each."""
    state = training.state
    phrases: list[str] = []
    guard = state.get("guard")
    if guard:
        changed = recipe_differences(training.recipe, guard)
        names = {re.sub("/[^']*/", "", str(at)) for at in changed.get("data.source", ())}
        if len(names) == 1:  # only the folders differ: what the files hold is compared below
            del changed["data.source"]
        phrases += [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]
        launch = training.arm.launch
        world_size = guard["launch.world_size"]
        kind = str(guard["launch.distribution"])
        same_kind = ("FSDP" in kind) == ("FSDP" in launch.distributed_type)
        if world_size != launch.world_size or not same_kind:
            now = f"{launch.distributed_type} x {launch.world_size}"
            phrases.append(f"launch {kind} x {world_size} -> {now}")
    before = state.get("data_files")
    if before:
        with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
            after = source_hashes(training.recipe.data)
            phrases += [f"{name} changed" for name in differences(before, after)]
    weights = RunDirectory(training.run).weights(training.recipe.lora is None)
    if state.get("state") == "finished" and not any(weights.glob("*.safetensors")):
        phrases.append("its weights are gone")
    return phrases
