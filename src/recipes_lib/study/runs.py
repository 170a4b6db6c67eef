"""What a study consists of, trainings and evaluations, and which of them are done. Reads files;
needs no torch.

A training is done when its run is finished with the settings and data that the study has now; an
evaluation when its result carries the key of what would be evaluated now.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ASKED, LaunchSection
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import object_or_none
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, RunState
from recipes_lib.data.sources import source_hashes
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import model_key
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import BASE_ARM, Arm, Study
from recipes_lib.training.resume_guard import recipe_differences
from recipes_lib.weights.load import base_fingerprint
from recipes_lib.weights.runs import finished_run

REPLACED = ".replaced"


@dataclass(frozen=True)
class Failure:
    """Why something failed, in one line, and the exit code."""

    error: str
    exit_code: int = int(ExitCode.FAILED)


@dataclass(frozen=True)
class StudyRun:
    """One run that a study trains: an arm, or one value of its grid, with one seed."""

    study: str
    arm: Arm
    seed: int

    @property
    def run(self) -> str:
        """Its name: `<study>--<arm>`, for another seed than the recipe's
        `<study>--<arm>--seed<N>`. It depends on no other seed, so that a seed that is added later
        trains nothing again.
        """
        own = self.seed == self.arm.own_seed
        return f"{self.study}--{self.arm.name}" + ("" if own else f"--seed{self.seed}")

    @property
    def directory(self) -> RunDirectory:
        """Its run."""
        return RunDirectory(self.run)

    @property
    def gpus(self) -> int:
        """How many GPUs it takes; a launch for the CPU takes none."""
        launch = self.arm.launch
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return 0 if launch.config.use_cpu or on_cpu else launch.per_machine

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
    """One result: a run's answers to an eval, against the run of an opponent where there is one;
    `head_to_head` where the study asks for that opponent, not the eval.
    """

    recipe: EvalRecipe
    arm: str
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
    run = training.directory
    state = run.read_state() if run.exists() else None
    if state is None or state["state"] != "finished" or settings_changed(training, state):
        return False
    return any(any(run.weights(full).glob("*.safetensors")) for full in (False, True))


def has_diverged(training: StudyRun) -> bool:
    """Whether a training of these settings ended because its loss was not finite."""
    run = training.directory
    state = run.read_state() if run.exists() else None
    diverged = state is not None and state["state"] == "failed" and state.get("exit_code") == 3
    return diverged and not settings_changed(training, state)


def settings_changed(training: StudyRun, state: RunState | None) -> list[str]:
    """Return what of a run is not as the study has it now, a phrase for each."""
    state = state or {}
    guard, launch = state.get("guard") or {}, training.arm.launch
    changed = recipe_differences(training.recipe, guard) if guard else {}
    phrases = [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]
    world, kind = guard.get("launch.world_size"), str(guard.get("launch.distribution"))
    if world is not None and world != launch.world_size:
        phrases.append(f"processes {world} -> {launch.world_size}")
    if world is not None and ("FSDP" in kind) != ("FSDP" in str(launch.distributed_type)):
        phrases.append(f"launch {kind} -> {launch.distributed_type}")
    before = state.get("data_files")
    with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
        now = source_hashes(training.recipe.data)
        if before is not None and before != now:
            names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            phrases += [f"{name} changed" for name in names]
    return phrases


def move_aside(run: RunDirectory) -> str:
    """Move a run to runs/.replaced/ and return where it lies now; nothing there is overwritten."""
    folder = runs_root() / REPLACED
    names = itertools.chain([run.name], (f"{run.name}--{number}" for number in itertools.count(2)))
    place = next(folder / name for name in names if not (folder / name).exists())
    folder.mkdir(parents=True, exist_ok=True)
    run.path.rename(place)
    return shown_path(place)


# ---- The base ----


def base_recipe(study: Study) -> Recipe:
    """Return the recipe that says how the base is asked: of the first arm without quantization,
    else the first.
    """
    recipes = [arm.recipe for arm in study.arms]
    return next((recipe for recipe in recipes if recipe.base_format is None), recipes[0])


def base_run(study: Study) -> str:
    """Return the run of the base model, asked as `base_recipe` says; empty before the base was
    first evaluated.
    """
    if not study.file.include_base:
        return ""
    recipe, newest = base_recipe(study), ("", "")
    for file in runs_root().glob("base--*/run.json"):
        state = object_or_none(file) or {}
        asked = state.get("stand_in") or {}
        same = asked.get("quantization") == recipe.quantization
        same &= asked.get("model") == recipe.model.model_dump()
        same &= all(asked.get("data", {}).get(key) == getattr(recipe.data, key) for key in ASKED)
        if same and state.get("base_fingerprint") in (None, base_fingerprint(recipe)):
            newest = max(newest, (str(state.get("created")), file.parent.name))
    return newest[1]


# ---- Evaluations ----


def evaluations(study: Study) -> list[Evaluation]:
    """Return every result that the study asks for; the base's are named after its run, `base` until
    that is known.

    In AlpacaEval the arms are also compared head to head: each with the study's baseline, or with
    every other arm where the study says `pairs: all`.
    """
    base = base_run(study) or BASE_ARM
    runs = {BASE_ARM: {0: base}} if study.file.include_base else {}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    pairs = [(study.baseline, arm) for arm in runs if arm != study.baseline]
    if study.file.pairs == "all":
        pairs = list(itertools.combinations(runs, 2))
    results: dict[tuple[str, str, str], Evaluation] = {}
    for recipe in study.evals:
        opponent = recipe.opponent(None) if recipe.is_judged else None
        against = {None: "", REFERENCE: "", BASE_ARM: base}.get(opponent, opponent or "")
        for arm, seeds in runs.items():
            for run in seeds.values():
                if run != against:
                    results[recipe.name, run, against] = Evaluation(recipe, arm, run, against)
        for first, second in pairs if recipe.suite.name == "alpaca_eval" else ():
            for other, run in _paired(runs[first], runs[second]):
                result = Evaluation(recipe, second, run, other, head_to_head=True)
                results.setdefault((recipe.name, run, other), result)
    return list(results.values())


def _paired(first: Mapping[int, str], second: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the runs of two arms that are compared: those of one seed, else of one place."""
    for place in range(max(len(first), len(second))):
        seed, run = list(second.items())[place % len(second)]
        yield first.get(seed, list(first.values())[place % len(first)]), run


def is_evaluated(result: Evaluation) -> bool:
    """Whether the result is there, and of the weights, questions and judge that the study has
    now.
    """
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
