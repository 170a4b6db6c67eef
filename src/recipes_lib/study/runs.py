"""The trainings and evaluations of a study, and which are done. Reads files; needs no torch.

A training is done when its run is finished with the settings and data that the study has now; an
evaluation when its result carries the key of what would be evaluated now.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import LaunchSection
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import read_rows
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, RunState
from recipes_lib.data.sources import source_hashes
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import evaluated_bases, model_key
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import BASE_ARM, Arm, Study
from recipes_lib.training.resume_guard import recipe_differences
from recipes_lib.weights.load import base_fingerprint
from recipes_lib.weights.runs import finished_run

REPLACED = ".replaced"


@dataclass(frozen=True)
class StudyRun:
    """One training of a study: an arm, or one value of its grid, with one seed."""

    study: str
    arm: Arm
    seed: int

    @property
    def run(self) -> str:
        """The name of its run; an added seed changes no other's, and so trains nothing again."""
        own = self.seed == self.arm.own_seed
        return f"{self.study}--{self.arm.name}" + ("" if own else f"--seed{self.seed}")

    @property
    def directory(self) -> RunDirectory:
        """Its run."""
        return RunDirectory(self.run)

    @property
    def state(self) -> RunState:
        """What run.json says; empty where there is no run."""
        return self.directory.read_state() if self.directory.exists() else RunState()

    @cached_property
    def recipe(self) -> Recipe:
        """What it is trained with: the arm's recipe with name, seed and launch."""
        recipe, launch = self.arm.recipe, self.arm.launch
        path = launch.config.path
        shipped = path.parent == project_root() / "accelerate_configs"
        return replace(
            recipe,
            name=self.run,
            run=recipe.run.model_copy(update={"name": self.run}),
            train={**recipe.train, "seed": self.seed},
            launch=LaunchSection(
                accelerate=path.stem if shipped else str(path.resolve()),
                gpus=launch.per_machine,
                nodes=launch.machines,
            ),
        )


@dataclass(frozen=True)
class Evaluation:
    """One result: a run's answers to an eval; `head_to_head` where the study names the opponent."""

    recipe: EvalRecipe
    run: str
    against: str = ""
    head_to_head: bool = False

    @property
    def file(self) -> Path:
        """Its result.json."""
        return log_file(runs_root() / self.run, self.recipe.name, self.against or None)

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.recipe.name} of {self.run}" + f" against {self.against}" * bool(self.against)


def study_folder(study: Study) -> Path:
    """Return runs/<study>, where logs, records and the report lie."""
    return runs_root() / study.name


# ---- Trainings ----


def study_trainings(study: Study) -> list[StudyRun]:
    """Return the runs of all arms and seeds, in order."""
    return [StudyRun(study.name, arm, seed) for arm in study.arms for seed in arm.seeds]


def study_tunings(study: Study) -> list[StudyRun]:
    """Return the trainings that choose the values of arms which have none yet."""
    open_arms = [arm for arm in study.arms if arm.tuning and arm.tuning.chosen is None]
    return [training for arm in open_arms for training in candidate_runs(study, arm)]


def candidate_runs(study: Study, arm: Arm) -> list[StudyRun]:
    """Return the training of each value of an arm's grid."""
    return [StudyRun(study.name, value, value.seeds[0]) for value in arm.candidates]


def runs_left(study: Study) -> list[StudyRun]:
    """Return every training that is not done, those that tune first."""
    trainings = (*study_tunings(study), *study_trainings(study))
    return [training for training in trainings if not is_trained(training)]


def is_trained(training: StudyRun) -> bool:
    """Whether a run is finished, with its weights, the study's settings and its data."""
    if training.state.get("state") != "finished" or settings_changed(training):
        return False
    folders = (training.directory.weights(full) for full in (False, True))
    return any(any(folder.glob("*.safetensors")) for folder in folders)


def has_diverged(training: StudyRun) -> bool:
    """Whether a training of these settings ended because its loss was not finite."""
    state = training.state
    diverged = state.get("state") == "failed" and state.get("exit_code") == ExitCode.NUMERICS
    return diverged and not settings_changed(training)


def settings_changed(training: StudyRun) -> list[str]:
    """Return what of a run is not as the study has it now, a phrase for each."""
    state, launch = training.state, training.arm.launch
    guard = state.get("guard")
    if not guard:
        return []
    changed = recipe_differences(training.recipe, guard)
    phrases = [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]
    world, kind = guard.get("launch.world_size"), str(guard.get("launch.distribution"))
    if world not in (None, launch.world_size):
        phrases.append(f"processes {world} -> {launch.world_size}")
    if world is not None and ("FSDP" in kind) != ("FSDP" in launch.distributed_type):
        phrases.append(f"launch {kind} -> {launch.distributed_type}")
    before = state.get("data_files") or {}
    with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
        now = source_hashes(training.recipe.data)
        names = sorted({*before, *now}) if before else []
        phrases += [f"{name} changed" for name in names if before.get(name) != now.get(name)]
    return phrases


def move_aside(run: RunDirectory) -> str:
    """Move a run to runs/.replaced/ and return where it lies now; nothing there is overwritten."""
    folder = runs_root() / REPLACED
    names = itertools.chain([run.name], (f"{run.name}--{number}" for number in itertools.count(2)))
    place = next(folder / name for name in names if not (folder / name).exists())
    folder.mkdir(parents=True, exist_ok=True)
    run.path.rename(place)
    return shown_path(place)


def with_choices(study: Study) -> Study:
    """Return the study with a value for each tuned arm whose grid is trained."""
    arms = []
    for arm in study.arms:
        tried = candidate_runs(study, arm)
        if tried and all(is_trained(run) or has_diverged(run) for run in tried):
            losses = [validation_loss(run.directory) if is_trained(run) else None for run in tried]
            arms.append(arm.tuned(losses))
        else:
            arms.append(arm)
    return replace(study, arms=tuple(arms))


def losses_text(arm: Arm) -> str:
    """Return the value that was chosen for a tuned arm, and the loss of each that was tried."""
    assert arm.tuning is not None
    tried = ", ".join(
        f"{value}: {'diverged' if loss is None else f'{loss:.4f}'}"
        for value, loss in zip(arm.tuning.values, arm.tuning.losses, strict=True)
    )
    chosen = "diverged at every value" if arm.tuning.chosen is None else arm.tuning.chosen
    return f"{arm.tuning.key} {chosen} (validation loss of {tried})"


def validation_loss(run: RunDirectory) -> float | None:
    """Return the validation loss of the weights that were kept: of the best step, or the end."""
    summary: Mapping[str, Any] = run.read_state().get("summary") or {}
    loss, best = summary.get("last_validation_loss"), summary.get("best_step")
    for row in read_rows(run.metrics, skip_damaged=True) if best is not None else ():
        if row.get("step") == best and "eval_loss" in row:
            loss = row["eval_loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else None


# ---- Evaluations ----


def base_recipe(study: Study) -> Recipe:
    """Return the recipe that says how the base is asked: the first without quantization, if any."""
    recipes = [arm.recipe for arm in study.arms]
    return next((recipe for recipe in recipes if recipe.base_format is None), recipes[0])


def base_run(study: Study) -> str:
    """Return the run of the base model; empty before it was first evaluated."""
    if not study.file.include_base:
        return ""
    recipe = base_recipe(study)
    bases = evaluated_bases(recipe.to_dict(), runs_root(), base_fingerprint(recipe))
    return bases[-1].name if bases else ""


def evaluations(study: Study) -> list[Evaluation]:
    """Return every result that the study asks for; in AlpacaEval arms also meet head to head."""
    base = base_run(study) or BASE_ARM
    runs: dict[str, dict[int, str]] = {BASE_ARM: {0: base}} if study.file.include_base else {}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    pairs = [(study.baseline, arm) for arm in runs if arm != study.baseline]
    if study.file.pairs == "all":
        pairs = list(itertools.combinations(runs, 2))
    results: dict[tuple[str, str, str], Evaluation] = {}
    for recipe in study.evals:
        opponent = recipe.opponent(None) if recipe.is_judged else None
        against = {None: "", REFERENCE: "", BASE_ARM: base}.get(opponent, opponent or "")
        for run in (run for seeds in runs.values() for run in seeds.values()):
            if run != against:
                results[recipe.name, run, against] = Evaluation(recipe, run, against)
        for first, second in pairs if recipe.suite.name == "alpaca_eval" else ():
            others = list(runs[first].values())
            longer = range(max(len(others), len(runs[second])))
            for place, (seed, run) in zip(longer, itertools.cycle(runs[second].items())):
                other = runs[first].get(seed, others[place % len(others)])
                result = Evaluation(recipe, run, other, head_to_head=True)
                results.setdefault((recipe.name, run, other), result)
    return list(results.values())


def is_evaluated(result: Evaluation) -> bool:
    """Whether the result is there, of the weights, questions and judge that the study has now."""
    with suppress(RecipesError, OSError):  # a model that is not here
        model: str | None = _model_key(result.run)
        opponent = _model_key(result.against) if result.against else None
        if result.recipe.generation.engine == "openai":
            model = opponent = None  # what a server answers with is known by its name
        return is_current(result.file, result.recipe.settings_key(), model, opponent)
    return False


def _model_key(run: str) -> str:
    """Return the hash of the model that a run's name stands for."""
    directory = RunDirectory(run)
    if fingerprint := directory.read_state().get("fingerprint"):  # a model without a run
        return str(fingerprint)
    trained = finished_run(directory, remote_code=True)
    return model_key(trained.recipe, trained.weights)


def missing_of(study: Study) -> list[str]:
    """Return what is not measured yet, a phrase for each training and result."""
    trained = {training.run: is_trained(training) for training in study_trainings(study)}
    missing = [f"training {run}" for run, done in trained.items() if not done]
    return missing + [
        result.title
        for result in evaluations(study)
        if not trained.get(result.run, True) or not is_evaluated(result)
    ]
