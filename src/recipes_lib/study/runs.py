"""What a study consists of, trainings and evaluations, and which of them are done. Reads files;
needs no torch.

A training is done when its run is finished with the settings and data that the study has now; an
evaluation when its result carries the key of what would be evaluated now.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ASKED, LaunchSection
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.files import hash_of, object_or_none, read_rows
from recipes_lib.core.project import project_root, runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, RunState
from recipes_lib.data.sources import source_hashes
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import model_key
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.config import BASE_ARM, Arm, Study
from recipes_lib.training.resume_guard import differences, flatten, recipe_differences
from recipes_lib.weights.load import base_fingerprint
from recipes_lib.weights.runs import finished_run

REPLACED = ".replaced"
_FREE = ("train.seed", "launch.accelerate", "launch.gpus", "launch.nodes")


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
    def state(self) -> RunState:
        """What run.json says; empty where there is no run."""
        return self.directory.read_state() if self.directory.exists() else RunState()

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


# ---- Tuning: the value of a grid whose training has the lowest validation loss ----


def with_choices(study: Study) -> Study:
    """Return the study with a value for each tuned arm whose grid is trained.

    Of equal losses the value that stands first in the grid wins. A training that diverged has no
    loss and cannot win; an arm that diverged everywhere has its losses and no value.
    """

    def tuned(arm: Arm) -> Arm:
        losses: list[float | None] = []
        for training in candidate_runs(study, arm):
            if has_diverged(training):
                losses.append(None)
            elif is_trained(training):
                losses.append(validation_loss(training.directory))
            else:
                return arm
        finite = [loss for loss in losses if loss is not None]
        if arm.tuning is None:
            return arm
        if not finite:
            return replace(arm, tuning=replace(arm.tuning, losses=tuple(losses)))
        return arm.tuned(arm.tuning.values[losses.index(min(finite))], losses)

    return replace(study, arms=tuple(map(tuned, study.arms)))


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
    """Return the validation loss of the weights that a training kept: of the checkpoint it chose,
    else of its end. None where there is no finite one.
    """
    summary: Mapping[str, Any] = run.read_state().get("summary") or {}
    loss, best = summary.get("last_validation_loss"), summary.get("best_step")
    for row in read_rows(run.metrics, skip_damaged=True) if best is not None else ():
        if row.get("step") == best and "eval_loss" in row:
            loss = row["eval_loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else None


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


# ---- The design ----


def design_values(study: Study) -> dict[str, Any]:
    """Return what must not change once verdicts were seen."""

    def hashed(values: Mapping[str, Any], free: Sequence[str]) -> str:
        return hash_of({key: value for key, value in values.items() if key not in free})

    return {
        # where a job runs and how many seeds there are make no other arm
        "arms": {arm.name: hashed(arm.resolved(), _FREE) for arm in study.arms},
        "seeds": {arm.name: sorted(arm.seeds) for arm in study.arms},
        # what is asked and who judges, not how fast
        "evals": {
            recipe.name: hashed(recipe.to_dict(), ("generation", "thresholds"))
            for recipe in study.evals
        },
        "base": study.file.include_base,
        "primary": study.aims.primary,
        "margins": {word: margin.size for word, margin in study.aims.margins.items()},
        "pairs": study.file.pairs,
    }


def launched_values(study: Study) -> dict[str, Any]:
    """Return what must not change while a job waits that evaluates and reports: all of the design
    but the arms, which are known by their runs, and the settings of every eval.
    """
    design = design_values(study)
    evals = {
        recipe.name: hash_of(recipe.to_dict(), recipe.settings_key()) for recipe in study.evals
    }
    own = {"evals": evals, "factors": study.file.factors, "baseline": study.baseline}
    return {key: design[key] for key in ("base", "primary", "margins", "pairs")} | own


def design_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two designs, a phrase for each."""
    known = {key: before.get(key) for key in now}
    changed = differences(flatten(known), flatten(dict(now)))
    verbs = {
        key: "added" if old is None else "removed" if new is None else "changed"
        for key, (old, new) in changed.items()
    }
    return [f"{key} {verb}" for key, verb in verbs.items()]
